"""GitOps on a real control plane: the shipped examples, a second sync, the actions, and the gate of a pull request."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.base import Json
from finetune_devcluster.cluster import DevCluster
from finetune_operator.desired.names import PREFLIGHT, TRAINER
from finetune_test_operator.jobs import Jobs
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet
from finetune_test_programs.gitops_judges import GITOPS, action_scripts, flux_expressions, health_script, judge

pytestmark = pytest.mark.cluster
EXAMPLES = GITOPS / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.rglob("kustomization.yaml"))
SERVER_SIDE = ("--server-side", "--field-manager=argocd-controller")


def build(cluster: DevCluster, folder: Path) -> list[Json]:
    """The objects of a folder, as Argo CD and Flux build them."""
    return list(yaml.safe_load_all(cluster.kubectl("kustomize", str(folder)).stdout))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_example_is_accepted(
    operator: OperatorProcess, dev_cluster: DevCluster, namespace: str, folder: Path
) -> None:
    objects = build(dev_cluster, folder)
    assert objects
    for manifest in objects:
        manifest["metadata"]["namespace"] = namespace
        options = ("apply", "--server-side", "--dry-run=server", "-f", "-")
        assert "Warning" not in dev_cluster.kubectl(*options, stdin=yaml.safe_dump(manifest)).stderr


def test_the_model_is_served_from_where_its_job_writes(dev_cluster: DevCluster) -> None:
    objects = {each["kind"]: each for each in build(dev_cluster, EXAMPLES / "train-then-serve")}
    job, deployment = objects.pop("FineTuneJob"), objects["Deployment"]
    metadata, s3 = job["metadata"], job["spec"]["output"]["s3"]
    place = f"s3://{s3['bucket']}/{s3['prefix']}/{metadata['namespace']}/{metadata['name']}/"
    assert place in deployment["spec"]["template"]["spec"]["initContainers"][0]["command"]
    wave = "argocd.argoproj.io/sync-wave"
    assert metadata["annotations"][wave] < min(each["metadata"]["annotations"][wave] for each in objects.values())


def test_argo_cds_own_settings_stay(dev_cluster: DevCluster, namespace: str) -> None:
    """A merge patch. `kubectl apply --server-side` would take over what Argo CD was installed with by `kubectl apply`,
    and remove what this file does not have."""
    document = yaml.safe_load((GITOPS / "argocd/argocd-cm.yaml").read_text())
    document["metadata"]["namespace"] = namespace
    own = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "argocd-cm"}, "data": {"url": "https://argo"}}
    dev_cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=yaml.safe_dump(own))
    options = ("patch", "cm", "argocd-cm", "-n", namespace, "--type=merge", f"--patch={json.dumps(document)}")
    dev_cluster.kubectl(*options)
    found = json.loads(dev_cluster.kubectl("get", "cm", "argocd-cm", "-n", namespace, "-o", "json").stdout)
    assert found["data"] == own["data"] | document["data"]


def a_job(dev_cluster: DevCluster, folder: str, namespace: str) -> Json:
    """The job of an example in the test's namespace, which writes where played pods say that they have written."""
    (job,) = build(dev_cluster, EXAMPLES / folder)
    job["metadata"]["namespace"], job["spec"]["output"] = namespace, {"s3": {"bucket": "results"}}
    return job


@pytest.mark.parametrize("options", [SERVER_SIDE, ()], ids=["server-side", "client-side"])
def test_a_second_sync_changes_nothing(
    operator: OperatorProcess,
    dev_cluster: DevCluster,
    jobs: Jobs,
    kubelet: PlayedKubelet,
    outcomes: Any,
    namespace: str,
    options: tuple[str, ...],
) -> None:
    """Neither the API server's defaults nor the operator change a field that Git has, or add one that would be taken
    away again."""
    manifest = yaml.safe_dump(a_job(dev_cluster, "base", namespace))
    dev_cluster.kubectl("apply", *options, "-f", "-", stdin=manifest)
    first = jobs.get("support-bot")
    for component, outcome in ((PREFLIGHT, outcomes.checked), (TRAINER, outcomes.success)):
        pod = kubelet.wait_for_pod("support-bot", component=component)
        kubelet.run(pod)
        kubelet.end(pod, 0, outcome.encode())
    over = jobs.wait_for_phase("support-bot", "Succeeded")

    def diff(text: str) -> str:
        return dev_cluster.kubectl("diff", *options, "-f", "-", stdin=text, check=False).stdout

    assert "+  generation: 2" in diff(manifest.replace("  model:", "  runPolicy: {suspend: true}\n  model:"))
    assert diff(manifest) == ""
    dev_cluster.kubectl("apply", *options, "-f", "-", stdin=manifest)
    again = jobs.get("support-bot")
    assert again["spec"] == first["spec"]
    assert again["metadata"]["generation"] == 1
    assert again["metadata"]["resourceVersion"] == over["metadata"]["resourceVersion"]

    fields = [
        name
        for entry in over["metadata"]["managedFields"]
        if entry["manager"] == "finetune-operator"
        for name in entry["fieldsV1"]
    ]
    assert fields == ["f:status"], "the operator owns nothing else"


def test_a_pull_request_is_accepted_before_a_gpu_is_asked_for(
    operator: OperatorProcess,
    dev_cluster: DevCluster,
    jobs: Jobs,
    kubelet: PlayedKubelet,
    outcomes: Any,
    namespace: str,
) -> None:
    """The checks pass; the trainer's pod exists and has no node."""

    def ask() -> tuple[str, str, str]:
        modes = {mode: flux_expressions(mode) for mode in ("accepted", "done")}
        (answer,) = judge([jobs.get(name)], expressions=modes, health=health_script())
        return answer["flux"]["accepted"]["status"], answer["flux"]["done"]["status"], answer["argo"]["status"]

    manifest = a_job(dev_cluster, "overlays/pull-request", namespace)
    name = manifest["metadata"]["name"]
    dev_cluster.kubectl("apply", *SERVER_SIDE, "-f", "-", stdin=yaml.safe_dump(manifest))
    pod = kubelet.wait_for_pod(name, component=PREFLIGHT)
    assert "nvidia.com/gpu" not in (pod.spec.containers[0].resources.limits or {})
    kubelet.run(pod)
    jobs.wait_for_phase(name, "Validating")
    assert ask() == ("InProgress", "InProgress", "Progressing")

    kubelet.end(pod, 0, outcomes.checked.encode())
    jobs.wait_for_phase(name, "Queued")
    assert ask() == ("Current", "InProgress", "Progressing")
    trainer = kubelet.wait_for_pod(name)
    assert trainer.spec.node_name is None
    assert trainer.spec.node_selector["finetune.dev/only-checked"] == "true"


def test_a_pull_request_whose_data_are_bad_is_refused(
    operator: OperatorProcess, jobs: Jobs, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("bad", preflight="Run")
    pod = kubelet.wait_for_pod("bad", component=PREFLIGHT)
    kubelet.run(pod)
    kubelet.end(pod, 11, outcomes.refused.encode())
    job = jobs.wait_for_phase("bad", "Failed")
    (answer,) = judge([job], expressions={"accepted": flux_expressions("accepted")}, health=health_script())
    assert answer["flux"]["accepted"]["status"] == answer["kstatus"]["status"] == "Failed"
    assert answer["argo"]["status"] == "Degraded"


def test_the_actions_work_on_a_job_that_runs(
    operator: OperatorProcess, jobs: Jobs, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    """Argo CD sends the difference that its script made as a merge patch."""

    def act(name: str) -> None:
        (answer,) = judge([jobs.get("acted")], actions={name: action_scripts()[name]})
        before, after = jobs.get("acted")["spec"]["runPolicy"], answer["acted"][name]["spec"]["runPolicy"]
        jobs.patch_run_policy("acted", **{key: value for key, value in after.items() if value != before.get(key)})

    jobs.create("acted")
    pod = kubelet.wait_for_pod("acted")
    kubelet.run(pod)
    jobs.wait_for_phase("acted", "Running")

    act("suspend")
    jobs.wait("acted", lambda status: status["reason"] == "Suspending", "the trainer is stopped")
    kubelet.end(pod, 30, outcomes.interrupted.encode())
    kubelet.remove(pod)
    jobs.wait_for_phase("acted", "Suspended")

    act("resume")
    pod = kubelet.wait_for_pod("acted")
    kubelet.run(pod)
    jobs.wait_for_phase("acted", "Running")

    act("cancel")
    jobs.wait("acted", lambda status: jobs.child_deadline("acted") is not None, "its deadline is set")
    kubelet.end(pod, 30, outcomes.interrupted.encode())
    kubelet.remove(pod)
    failed = jobs.wait_for_phase("acted", "Failed", seconds=30)["status"]
    assert failed["failure"]["reason"] == "DeadlineExceeded"
