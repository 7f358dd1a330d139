"""The two images on a real node: from an empty cluster to artifacts in S3, and whatever may happen to pods on the way.

Root only: `make images`, then `make e2e-node`. A job here trains a tiny model on the CPU; no GPU is played.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from finetune_devcluster.inputs import BUCKET, keys_below, put_inputs, read_json
from finetune_devcluster.platform import CHECKOUT, SYSTEM_NAMESPACE
from finetune_devcluster.real_node.platform import RealPlatform
from finetune_test_programs.binaries import helm_binary, kube_binary

pytestmark = [pytest.mark.node, pytest.mark.timeout(1500)]

README = (CHECKOUT / "README.md").read_text()
SAMPLE = yaml.safe_load((CHECKOUT / "crds/samples/cpu-tiny.yaml").read_text())
NAMESPACE, NAME = "default", "tiny-chat"
LONG = {"maxSteps": 10_000, "checkpointSteps": 10, "batchSize": 1, "gradientAccumulation": 1}

Job = dict[str, Any]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealPlatform]:
    with RealPlatform.start_real() as running:
        put_inputs(running.store, tmp_path_factory.mktemp("inputs"), rows=48)
        yield running


@pytest.fixture(scope="module")
def five_commands(platform: RealPlatform, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs the README's commands, and keeps how long they took and the job."""
    section = README[README.index("\n## On a cluster\n") :]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    commands = block[1].splitlines()
    assert len(commands) == 5

    programs = tmp_path_factory.mktemp("programs")
    for name, program in {"kubectl": f"{kube_binary()} kubectl", "helm": str(helm_binary())}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "KUBECONFIG": str(platform.cluster.kubeconfig),
        "HOME": str(programs),
        "REGISTRY": "localhost",
        "AWS_ACCESS_KEY_ID": platform.store.access_key,
        "AWS_SECRET_ACCESS_KEY": platform.store.secret_key,
    }

    start = time.monotonic()
    for command in commands:
        if command.startswith("kubectl wait"):  # which would wait for a job that has failed, too
            job = platform.wait_for_end(NAMESPACE, NAME, timeout=900)
            assert job["status"]["phase"] == "Succeeded", _whole_story(platform)
        shell = ["bash", "-c", command]
        done = subprocess.run(shell, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
        print(f"{time.monotonic() - start:6.1f} s  {command}")
        assert done.returncode == 0, f"{command}\n{done.stderr}\n{_whole_story(platform)}"
    return {"seconds": time.monotonic() - start, "job": platform.job(NAMESPACE, NAME)}


def test_five_commands_lead_from_an_empty_cluster_to_artifacts_in_s3(
    platform: RealPlatform, five_commands: dict[str, Any]
) -> None:
    status = five_commands["job"]["status"]
    print(f"from helm install to the first Succeeded job: {five_commands['seconds']:.0f} s")
    assert status["phase"] == "Succeeded"
    manifest = read_json(platform.store, status["manifestUri"])
    keys = keys_below(platform.store, "finished/")
    for artifact in manifest["artifacts"]:  # a file, or a folder of files
        assert any(f"s3://{BUCKET}/{key}".startswith(artifact["uri"]) for key in keys), artifact
    assert {"Adapter", "Merged", "GGUF"} <= {artifact["type"] for artifact in manifest["artifacts"]}
    assert status["progress"]["percent"] == 100, "trainers reach the operator by its Service's name, over TLS"


def test_pods_run_restricted_as_the_images_own_user_without_a_shell(
    platform: RealPlatform, five_commands: dict[str, Any]
) -> None:
    (pod,) = platform.trainer_pods(NAMESPACE, NAME)
    assert pod.spec.node_name == platform.node.name
    assert pod.status.container_statuses[0].image.startswith("localhost/finetune-trainer:")
    assert pod.spec.security_context.run_as_non_root
    namespace = client.CoreV1Api(platform.cluster.api_client()).read_namespace(NAMESPACE)
    assert namespace.metadata.labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert "finetune_trainer" in platform.pod_log(pod)


def test_pod_security_refuses_what_the_trainer_is_not(platform: RealPlatform, five_commands: dict[str, Any]) -> None:
    core: Any = client.CoreV1Api(platform.cluster.api_client())
    spec = {"containers": [{"name": "root", "image": "localhost/finetune-trainer:0.1.0"}]}
    with pytest.raises(client.exceptions.ApiException, match="violates PodSecurity"):
        core.create_namespaced_pod(NAMESPACE, {"metadata": {"name": "root"}, "spec": spec})


def test_the_installation_is_whole_by_its_own_test(platform: RealPlatform, five_commands: dict[str, Any]) -> None:
    said = platform.cluster.helm("test", "finetune-operator", "-n", SYSTEM_NAMESPACE, "--timeout", "180s").stdout
    assert "Phase:          Succeeded" in said


def test_network_policies_are_accepted(platform: RealPlatform, five_commands: dict[str, Any]) -> None:
    """The bridge enforces none of them: that is another network's business."""
    chart = str(CHECKOUT / "charts/finetune-operator")
    values = {f"networkPolicy.{who}.enabled": "true" for who in ("operator", "trainers")}
    settings = [f"--set={name}={value}" for name, value in values.items()]
    settings.append(f"--set=networkPolicy.trainers.namespaces={{{NAMESPACE}}}")
    where = ("-n", SYSTEM_NAMESPACE, "--reuse-values", "--wait", "--timeout", "240s")
    platform.cluster.helm("upgrade", "finetune-operator", chart, *where, *settings)
    found = client.NetworkingV1Api(platform.cluster.api_client()).list_network_policy_for_all_namespaces().items
    assert {each.metadata.namespace for each in found} == {SYSTEM_NAMESPACE, NAMESPACE}  # type: ignore[union-attr]


def test_the_operator_needs_little_memory(platform: RealPlatform, five_commands: dict[str, Any]) -> None:
    sizes = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            command, text = (status.parent / "cmdline").read_bytes(), status.read_text()
        except OSError:
            continue
        if b"/opt/finetune/bin/finetune-operator" in command:
            sizes.append(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024)  # type: ignore[index]
    print(f"RSS of the operator's replicas: {', '.join(f'{size:.0f} MiB' for size in sizes)}")
    assert len(sizes) == 2
    assert max(sizes) < 200


def test_suspension_eviction_and_a_new_operator_leave_the_training_where_it_was(
    platform: RealPlatform, five_commands: dict[str, Any]
) -> None:
    job = _long_job("disturbed")
    platform.apply(job)
    _wait_for_step(platform, job, 12)
    _suspend(platform, job, suspend=True)
    paused = platform.wait_for(NAMESPACE, "disturbed", _phase("Suspended"), timeout=90, what="suspended")
    checkpoint = paused["status"]["checkpointStep"]
    assert checkpoint >= 10
    _suspend(platform, job, suspend=False)
    resumed = _wait_for_step(platform, job, checkpoint + 1)
    assert resumed["status"]["resumedFromStep"] == checkpoint

    pod = _running_pod(platform, "disturbed")
    core: Any = client.CoreV1Api(platform.cluster.api_client())
    names = {"name": pod.metadata.name, "namespace": NAMESPACE}
    core.create_namespaced_pod_eviction(pod.metadata.name, NAMESPACE, {"metadata": names})
    after = platform.wait_for(
        NAMESPACE, "disturbed", lambda each: _step(each) > _step(resumed) and _new_pod(platform, each, pod),
        timeout=180, what="training in a new pod")  # fmt: skip
    assert after["status"]["resumedFromStep"] >= checkpoint

    trainer = _running_pod(platform, "disturbed")
    platform.cluster.kubectl("delete", "pods", "--all", "--namespace", SYSTEM_NAMESPACE, "--wait=false")
    at = _step(platform.job(NAMESPACE, "disturbed"))
    platform.wait_for(NAMESPACE, "disturbed", lambda each: _step(each) > at + 5, timeout=120, what="seen to go on")
    assert _running_pod(platform, "disturbed").metadata.uid == trainer.metadata.uid

    platform.delete(NAMESPACE, "disturbed")
    _wait(lambda: not platform.trainer_pods(NAMESPACE, "disturbed"), 90)


def test_a_job_survives_a_node_that_loses_its_power(platform: RealPlatform, five_commands: dict[str, Any]) -> None:
    job = _long_job("powerless")
    job["spec"]["training"]["maxSteps"] = 200
    platform.apply(job)
    _wait_for_step(platform, job, 12)
    platform.node.switch_off()
    platform.node.switch_on()
    done = platform.wait_for_end(NAMESPACE, "powerless", timeout=600)
    assert done["status"]["phase"] == "Succeeded", _whole_story(platform)
    assert done["status"]["resumedFromStep"] >= 10


def _long_job(name: str) -> Job:
    job: Job = yaml.safe_load((CHECKOUT / "crds/samples/cpu-tiny.yaml").read_text())
    job["metadata"] = {"name": name, "namespace": NAMESPACE}
    job["spec"]["model"]["maxSequenceLength"] = 128
    job["spec"]["training"] = dict(LONG)
    job["spec"]["export"] = {"merged": "None", "gguf": []}
    job["spec"]["runPolicy"]["preflight"] = "Skip"
    return job


def _step(job: Job) -> int:
    return int(job.get("status", {}).get("progress", {}).get("step") or 0)


def _phase(phase: str) -> Callable[[Job], bool]:
    return lambda job: job.get("status", {}).get("phase") == phase


def _wait_for_step(platform: RealPlatform, job: Job, step: int) -> Job:
    name = job["metadata"]["name"]
    try:
        return platform.wait_for(
            NAMESPACE, name, lambda each: _step(each) >= step, timeout=180, what=f"at step {step}")  # fmt: skip
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{_whole_story(platform)}") from None


def _suspend(platform: RealPlatform, job: Job, *, suspend: bool) -> None:
    job["spec"]["runPolicy"]["suspend"] = suspend
    platform.apply(job)


def _running_pod(platform: RealPlatform, name: str) -> Any:
    return next(pod for pod in platform.trainer_pods(NAMESPACE, name) if pod.status.phase == "Running")


def _new_pod(platform: RealPlatform, job: Job, old: Any) -> bool:
    pods = platform.trainer_pods(NAMESPACE, job["metadata"]["name"])
    return any(pod.status.phase == "Running" and pod.metadata.uid != old.metadata.uid for pod in pods)


def _wait(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        time.sleep(0.5)


def _whole_story(platform: RealPlatform) -> str:
    """Pods, the job, the operator's log and the node's, for whoever reads a failure."""
    pods = platform.cluster.kubectl("get", "pods", "-A", "-o", "wide").stdout
    described = platform.cluster.kubectl("describe", "pods", "-n", NAMESPACE, check=False).stdout[-3000:]
    jobs = platform.cluster.kubectl("get", "ftj", "-A", "-o", "yaml", check=False).stdout[-3000:]
    log = platform.trainer_log(NAMESPACE, NAME)
    return "\n".join((pods, described, jobs, log, platform.operator_log()[-3000:], platform.node.log(1500)))
