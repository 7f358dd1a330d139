"""Every way a job can end: named failures, reuse, deletion, suspension, and an operator that dies on the way."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from kubernetes import client

from finetune_devcluster.inputs import BUCKET, keys_below, put_text, read_json
from finetune_devcluster.platform import SYSTEM_NAMESPACE, Platform

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]

Builder = Callable[..., dict[str, Any]]
LONG = {"maxSteps": 10_000, "checkpointSteps": 10, "batchSize": 1, "gradientAccumulation": 1}

BAD_ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messages": 7}\n'

FAILURES = {
    "a bad row names its line": ({"dataset": {"source": f"s3://{BUCKET}/data/bad.jsonl"}}, "InvalidRow", "bad.jsonl:2"),
    "an absent model": ({"model": {"source": f"s3://{BUCKET}/no-such-model/"}}, "ModelNotFound", "no-such-model"),
}


@pytest.mark.parametrize(("changes", "reason", "part"), FAILURES.values(), ids=FAILURES)
def test_failure_arrives_with_its_reason_within_ten_seconds(
    platform: Platform, small_job: Builder, changes: dict[str, Any], reason: str, part: str
) -> None:
    put_text(platform.store, "data/bad.jsonl", BAD_ROW)
    job = small_job(f"fails-{reason.lower()}", runPolicy={"preflight": "Run"}, **changes)
    platform.apply(job)
    done = platform.wait_for_end(**_key(job), timeout=90)
    seen = time.time()
    assert done["status"]["phase"] == "Failed"
    assert done["status"]["failure"]["reason"] == reason
    assert part in done["status"]["failure"]["message"]
    assert done["status"]["failure"]["hint"]
    (checks,) = platform.trainer_pods(**_key(job), component="preflight")
    assert seen - checks.status.container_statuses[0].state.terminated.finished_at.timestamp() < 10
    assert done["status"]["failure"]["stage"] == "Preflight"
    assert platform.trainer_pods(**_key(job)) == []
    assert {key.rsplit("/", 1)[1] for key in _keys_below(platform, job)} == {"report.html", "report.json"}


def test_a_missing_bucket_fails_before_training(platform: Platform, small_job: Builder) -> None:
    job = small_job("fails-bucket")
    job["spec"]["output"]["s3"]["bucket"] = "no-such-bucket"
    platform.apply(job)
    done = platform.wait_for_end(**_key(job), timeout=90)
    assert done["status"]["failure"]["reason"] == "BucketNotFound"
    assert "Training" not in [stage["name"] for stage in done["status"].get("stages", [])]


def test_a_recreated_job_does_not_train_again(platform: Platform, small_job: Builder) -> None:
    job = small_job("reused")
    platform.apply(job)
    first = platform.wait_for_end(**_key(job), timeout=120)
    assert first["status"]["phase"] == "Succeeded", platform.trainer_log(**_key(job))
    for preflight, trainers in (("Run", 0), ("Skip", 1)):
        platform.delete(**_key(job))
        _wait(lambda: not _pods(platform, job), 30)
        job["spec"]["runPolicy"]["preflight"] = preflight
        platform.apply(job)
        again = platform.wait_for_end(**_key(job), timeout=60)
        assert again["metadata"]["uid"] != first["metadata"]["uid"]
        assert again["status"]["reused"] is True
        assert again["status"]["artifacts"] == first["status"]["artifacts"]
        assert len(platform.trainer_pods(**_key(job))) == trainers


def test_suspension_stops_the_trainer_and_resume_goes_on_from_its_checkpoint(
    platform: Platform, small_job: Builder
) -> None:
    job = small_job("paused", training=LONG)
    platform.apply(job)
    platform.wait_for(**_key(job), holds=lambda j: _step(j) >= 12, timeout=90, what="training")
    _suspend(platform, job, suspend=True)
    paused = platform.wait_for(**_key(job), holds=_phase("Suspended"), timeout=40, what="suspended")
    checkpoint = paused["status"]["checkpointStep"]
    assert checkpoint >= 10
    _wait(lambda: not platform.trainer_pods(**_key(job)), 40)
    _suspend(platform, job, suspend=False)
    resumed = platform.wait_for(**_key(job), holds=lambda j: _step(j) > checkpoint, timeout=60, what="training again")
    assert resumed["status"]["resumedFromStep"] == checkpoint
    platform.delete(**_key(job))


def test_deletion_ends_the_trainer_and_leaves_nothing_running(platform: Platform, small_job: Builder) -> None:
    job = small_job("deleted", training=LONG)
    platform.apply(job)
    platform.wait_for(**_key(job), holds=lambda j: _step(j) >= 1, timeout=90, what="training")
    platform.delete(**_key(job))
    _wait(lambda: not platform.trainer_pods(**_key(job)), 40)
    core = client.CoreV1Api(platform.cluster.api_client())
    selector = "finetune.dev/job-name=deleted"
    _wait(lambda: not core.list_namespaced_config_map(job["metadata"]["namespace"], label_selector=selector).items, 20)
    assert not [
        key for key in _keys_below(platform, job) if key.endswith("manifest.json") and "/checkpoints/" not in key
    ]


def test_the_operator_may_die_at_any_time(platform: Platform, small_job: Builder) -> None:
    reference = small_job("undisturbed", training={"maxSteps": 6})
    disturbed = small_job("disturbed", training={"maxSteps": 6}, runPolicy={"preflight": "Run"})
    platform.apply(reference)
    expected = platform.wait_for_end(**_key(reference), timeout=120)
    platform.apply(disturbed)
    points: tuple[Callable[[dict[str, Any]], bool], ...] = (
        _phase("Validating"),
        lambda j: "result" in j["status"].get("preflight", {}),
        lambda j: _step(j) >= 1,
        lambda j: j["status"]["phase"] != "Running",
    )
    for point in points:
        platform.wait_for(**_key(disturbed), holds=point, timeout=90, what="at the next point to kill the operator")
        _kill_operator(platform)
    done = platform.wait_for_end(**_key(disturbed), timeout=120)
    assert done["status"]["phase"] == expected["status"]["phase"] == "Succeeded"
    assert len(platform.trainer_pods(**_key(disturbed))) == len(platform.trainer_pods(**_key(reference))) == 1
    assert len(platform.trainer_pods(**_key(disturbed), component="preflight")) == 1
    assert platform.trainer_pods(**_key(reference), component="preflight") == []
    digests = [{a["type"] for a in j["status"]["artifacts"]} for j in (done, expected)]
    assert digests[0] == digests[1]
    assert read_json(platform.store, done["status"]["manifestUri"])["artifacts"]


def _key(job: dict[str, Any]) -> dict[str, str]:
    return {"namespace": job["metadata"]["namespace"], "name": job["metadata"]["name"]}


def _pods(platform: Platform, job: dict[str, Any]) -> list[Any]:
    return [pod for kind in ("trainer", "preflight") for pod in platform.trainer_pods(**_key(job), component=kind)]


def _step(job: dict[str, Any]) -> int:
    return int(job.get("status", {}).get("progress", {}).get("step") or 0)


def _phase(phase: str) -> Callable[[dict[str, Any]], bool]:
    return lambda job: job.get("status", {}).get("phase") == phase


def _suspend(platform: Platform, job: dict[str, Any], *, suspend: bool) -> None:
    job["spec"]["runPolicy"]["suspend"] = suspend
    platform.apply(job)


def _keys_below(platform: Platform, job: dict[str, Any]) -> list[str]:
    output = job["spec"]["output"]["s3"]
    prefix = f"{output['prefix']}/{job['metadata']['namespace']}/{job['metadata']['name']}/"
    return keys_below(platform.store, prefix)


def _kill_operator(platform: Platform) -> None:
    """SIGKILL by way of a pod deletion without grace; the Deployment starts another one."""
    core = client.CoreV1Api(platform.cluster.api_client())
    for pod in core.list_namespaced_pod(SYSTEM_NAMESPACE).items:
        core.delete_namespaced_pod(pod.metadata.name, SYSTEM_NAMESPACE, grace_period_seconds=0)


def _wait(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        time.sleep(0.3)
