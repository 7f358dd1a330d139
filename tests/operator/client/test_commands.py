"""The commands on a real API server, as a user who has rights in one namespace; the operator runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from finetune_api.status import FineTuneJobStatus
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster

HOSTILE = "\x1b[2J\x1b]0;owned\x07rows\u202e are\r gone\n\x9b31m"


def write_manifest(path: Path, name: str, queue: str = "", **resources: Any) -> Path:
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "labels": {"example.com/owner": "a"}},
        "spec": {
            "model": {"source": "s3://models/tiny/"},
            "dataset": {"source": "s3://data/chat.jsonl"},
            "output": {"s3": {"bucket": "results"}},
            "resources": {"gpus": 0} | resources,
            "scheduling": {"queueName": queue} if queue else {},
            "runPolicy": {"preflight": "Skip"},
        },
    }
    path.write_text(yaml.safe_dump(job))
    return path


def test_a_job_is_submitted_watched_described_and_run_again(
    operator: OperatorProcess,
    jobs: Any,
    kubelet: PlayedKubelet,
    outcomes: Any,
    users: Any,
    finetune: Any,
    tmp_path: Path,
) -> None:
    me = ("--kubeconfig", users.owner())
    manifest = write_manifest(tmp_path / "job.yaml", "bot")

    assert "nothing was changed" in finetune("submit", manifest, "--dry-run", *me).out
    assert not jobs.exists("bot")
    assert "job bot is created" in finetune("submit", manifest, *me).out
    again = finetune("submit", manifest, *me)
    assert (again.code, again.out) == (1, "")
    assert "job bot exists already" in again.err

    pod = kubelet.wait_for_pod("bot")
    kubelet.run(pod)
    jobs.wait_for_phase("bot", "Running")
    assert "Running" in finetune("list", *me).out
    assert json.loads(finetune("list", "bot", "-o", "json", *me).out)["metadata"]["name"] == "bot"
    assert finetune("list", "-o", "name", *me).out == "finetunejob.finetune.dev/bot\n"
    assert "has not failed (phase Running)" in finetune("retry", "bot", *me).err

    kubelet.end(pod, 12, outcomes.bad_row.encode())
    first = jobs.wait_for_phase("bot", "Failed")
    watched = finetune("watch", "bot", *me)
    assert watched.code == 7
    assert "bot: Failed, InvalidRow" in watched.out
    assert "line 2: messages is not a list" in watched.out
    described = finetune("describe", "bot", *me).out
    assert "what to do" in described
    assert "conditions" in described
    assert "Warning InvalidRow" in finetune("events", "bot", *me).out

    # Terminal stays terminal: what runs again is another job of the same name, place and spec.
    retried = finetune("retry", "bot", *me)
    assert retried.code == 0, retried.err
    second = jobs.get("bot")
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    assert second["spec"] == first["spec"]
    assert second["metadata"]["labels"] == first["metadata"]["labels"]


def test_a_job_is_suspended_resumed_and_cancelled(
    operator: OperatorProcess, jobs: Any, users: Any, finetune: Any, namespace: str
) -> None:
    me = ("--kubeconfig", users.owner())
    jobs.create("bot")
    assert "is being suspended" in finetune("suspend", "bot", *me).out
    jobs.wait_for_phase("bot", "Suspended")
    assert "suspended already" in finetune("suspend", "bot", *me).out

    # Its steps have 8 rows: other numbers of nodes that divide them go on from its checkpoint, in a job of its name.
    refused = finetune("resume", "bot", "--nodes", "3", *me)
    assert refused.code == 10
    assert "write values whose product is 6 or 9" in refused.err
    first = jobs.get("bot")
    assert "gets other resources (nodes: 2)" in finetune("resume", "bot", "--nodes", "2", *me).out
    second = jobs.get("bot")
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    assert second["spec"]["resources"] == first["spec"]["resources"] | {"nodes": 2}
    assert "is not suspended" in finetune("resume", "bot", "--nodes", "1", *me).err

    assert "is being suspended" in finetune("suspend", "bot", *me).out
    jobs.wait_for_phase("bot", "Suspended")
    assert "goes on" in finetune("resume", "bot", *me).out
    jobs.wait("bot", lambda status: status.get("phase") in ("Pending", "Queued"), "the job goes on")
    assert "is cancelled" in finetune("cancel", "bot", *me).out
    # It stays as Cancelling until its pods have ended and the garbage collector has seen that.
    assert not jobs.exists("bot") or jobs.get("bot")["metadata"]["deletionTimestamp"]


def test_gpus_by_job_and_queue_are_shown_with_and_without_the_right_to_see_nodes(
    operator: OperatorProcess, users: Any, finetune: Any, tmp_path: Path, dev_cluster: Any, namespace: str
) -> None:
    me = ("--kubeconfig", users.owner())
    finetune("submit", write_manifest(tmp_path / "job.yaml", "bot", queue="team-a", gpus=1), *me)
    shown = finetune("top", *me).out
    assert "team-a" in shown
    assert "the nodes' GPUs are not shown: you may not list nodes in the whole cluster" in shown
    admin = finetune("top", "-n", namespace, "--kubeconfig", dev_cluster.kubeconfig).out
    assert "nvidia.com/gpu: these jobs hold 0 of the 0 that the nodes offer" in admin


def test_the_estimate_is_that_of_preflight(users: Any, finetune: Any, jobs: Any, operator: OperatorProcess) -> None:
    me = ("--kubeconfig", users.owner())
    jobs.create("skipped")
    assert "runPolicy.preflight: Skip" in finetune("estimate", "skipped", *me).err
    jobs.create("checked", preflight="Run", suspend=True)
    jobs.wait_for_phase("checked", "Suspended")
    preflight = {"result": "Passed", "rows": 40, "steps": 20, "gpuMemoryBytes": 12 << 30, "gpuHours": 0.25}
    FineTuneJobStatus.model_validate({"preflight": preflight})
    jobs.set_status("checked", {"preflight": preflight})
    said = finetune("estimate", "checked", *me)
    assert said.code == 0
    assert "12.0 GiB" in said.out
    assert "0.25" in said.out


def test_artifacts_are_listed_from_the_status_and_a_download_is_that_of_finetune(
    operator: OperatorProcess, jobs: Any, users: Any, finetune: Any, namespace: str, tmp_path: Path
) -> None:
    me = ("--kubeconfig", users.owner())
    jobs.create("bot", suspend=True)
    jobs.wait_for_phase("bot", "Suspended")
    early = finetune("artifacts", "bot", *me)
    assert (early.code, early.out) == (1, "")
    assert "job bot has no artifacts yet: its phase is Suspended" in early.err

    made = {"type": "GGUF", "uri": "s3://results/bot-Q8_0.gguf", "bytes": 4096, "sha256": "a" * 64, "format": "gguf"}
    jobs.set_status("bot", {"artifacts": [made | {"quantization": "Q8_0", "loss": 1.25}]})
    listed = finetune("artifacts", f"{namespace}/bot", *me)
    assert listed.code == 0
    assert [line.split() for line in listed.out.splitlines()[:2]] == [
        ["TYPE", "QUANTIZATION", "LOSS", "BYTES", "SHA256"],
        ["GGUF", "Q8_0", "1.2500", "4,096", "aaaaaaaaaaaa…"],
    ]
    assert f"{'a' * 64}  s3://results/bot-Q8_0.gguf\n" in listed.out
    assert "aaaa" not in finetune("artifacts", "bot", "--type", "Adapter", *me).out

    # The job has no manifest, which only the program that downloads finds out.
    assert finetune("artifacts", "bot", "--download", tmp_path / "out", *me).code == 20


def test_what_a_cluster_says_cannot_write_to_the_terminal(
    operator: OperatorProcess, jobs: Any, users: Any, finetune: Any, namespace: str, dev_cluster: Any
) -> None:
    me = ("--kubeconfig", users.owner())
    job = jobs.create("bot")
    about = {"kind": "FineTuneJob", "name": "bot", "namespace": namespace, "uid": job["metadata"]["uid"]}
    event = {"metadata": {"name": "hostile"}, "involvedObject": about, "reason": "Odd", "message": HOSTILE}
    core: Any = client.CoreV1Api(dev_cluster.api_client())
    core.create_namespaced_event(namespace, event)
    assert core.read_namespaced_event("hostile", namespace).message == HOSTILE

    said = finetune("events", "bot", *me).out
    assert "rows are gone" in said
    assert not set(said) & set("\x1b\x9b\x07\r\u202e")


def test_kubectl_completes_names_of_jobs_and_contexts(
    operator: OperatorProcess, jobs: Any, users: Any, namespace: str
) -> None:
    from finetune_client.complete import candidates
    from finetune_client.verbs import VERBS

    jobs.create("bot-a")
    jobs.create("other")
    me = ["--kubeconfig", str(users.owner())]
    assert candidates(["des"], VERBS) == ["describe"]
    assert candidates(["describe", *me, "bo"], VERBS) == ["bot-a"]
    assert candidates(["list", *me, "--context", ""], VERBS) == ["dev"]
    assert candidates(["list", "-o", "w"], VERBS) == ["wide"]
    assert candidates(["list", *me, "-n", ""], VERBS) == []  # no right to list namespaces: nothing, and no error
