"""Reading a job: which requests are made, whose pods they are, and what only Events show."""

from datetime import datetime
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api import API_VERSION, KIND
from finetune_api.base import Json
from finetune_api.explain import explain_errors
from finetune_api.job import validate_document
from finetune_api.status import FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import Phase, PreflightResult
from finetune_operator.cluster.cluster import NamespacedName
from finetune_operator.desired.names import child_name, preflight_name
from finetune_operator.desired.preflight_job import build_preflight_job
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_operator.errors import ForbiddenError
from finetune_operator.observe.observe import observe, read_status
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.snapshot import BlindSnapshot, Snapshot, UnreadableSnapshot
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_test_operator.snapshot_builder import INSTALLATION, METADATA, NOW, a_report, a_spec, at

CHECKED = FineTuneJobStatus(phase=Phase.QUEUED, preflight=PreflightStatus(result=PreflightResult.PASSED))
TRAINER_JOB = build_trainer_job(METADATA, a_spec(), "image", "config")
PREFLIGHT_JOB = build_preflight_job(METADATA, a_spec(), "image", "config")


class FakeCluster:
    """One job with the given children; requests are kept."""

    def __init__(self, *jobs: Json, spec: Json | None = None, status: Json | None = None) -> None:
        self.body: Json | None = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "bot", "namespace": "team", "uid": METADATA.uid, "generation": 1},
            "spec": spec or a_spec().to_wire(),
            "status": status or {},
        }
        self.jobs = {job["metadata"]["name"]: job for job in jobs}
        for job in jobs:
            job["metadata"]["uid"] = f"uid of {job['metadata']['name']}"
        self.pods: list[Json] = []
        self.events: dict[str, list[Json]] = {}
        self.asked: list[str] = []
        self.hidden = ""
        self.queues = None  # nothing here is in one: test_queue.py

    def now(self) -> datetime:
        return NOW

    async def get_fine_tune_job(self, key: NamespacedName) -> Json | None:
        return self.body

    async def get_job(self, namespace: str, name: str) -> Json | None:
        self._ask("job", name)
        return self.jobs.get(name)

    async def get_config_map(self, namespace: str, name: str) -> Json | None:
        self._ask("config map", name)
        return None

    async def list_pods(self, name: NamespacedName) -> list[Json]:
        self._ask("pods")
        return self.pods

    async def list_jobs(self, name: NamespacedName) -> list[Json]:
        self._ask("jobs")
        return list(self.jobs.values())

    async def list_events(self, namespace: str, uid: str, reason: str) -> list[Json]:
        return self.events.get(reason, [])

    def _ask(self, kind: str, name: str = "") -> None:
        self.asked.append(f"{kind} {name}".rstrip())
        if kind == self.hidden:
            raise ForbiddenError(403, f"GET {kind}", "no right")

    async def observe(self, terminated: TerminatedPods | None = None, reports: ReportStore | None = None) -> Any:
        key = NamespacedName("team", "bot")
        pods, received = terminated or TerminatedPods(), reports or ReportStore()
        return await observe(self, key, pods, received, INSTALLATION)  # type: ignore[arg-type]


def _pod(uid: str, job: Json, created: float = 0, **status: Any) -> Json:
    owner = {"kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"], "controller": True}
    labels = {"finetune.dev/job-uid": METADATA.uid}
    metadata = {
        "namespace": "team",
        "name": f"pod-{uid}",
        "uid": uid,
        "creationTimestamp": at(created),
        "labels": labels,
    }
    return {"metadata": metadata | {"ownerReferences": [owner]}, "status": status}


async def test_a_job_that_is_gone_has_no_snapshot() -> None:
    cluster = FakeCluster()
    cluster.body = None
    assert await cluster.observe() is None


@pytest.mark.parametrize("is_known", [True, False])
async def test_of_two_pods_of_one_second_the_newer_speaks_whatever_their_names(is_known: bool) -> None:
    ended = {"state": {"terminated": {"exitCode": 30, "startedAt": at(0), "finishedAt": at(0)}}}
    running = {"state": {"running": {"startedAt": at(0)}}}
    attempt = {"pod": "pod-z", "uid": "z", "exitCode": 30}
    cluster = FakeCluster(TRAINER_JOB, status=CHECKED.to_wire() | ({"attempts": [attempt]} if is_known else {}))
    cluster.pods = [
        _pod("z", TRAINER_JOB, phase="Failed", containerStatuses=[{"name": "trainer"} | ended]),
        _pod("a", TRAINER_JOB, phase="Running", containerStatuses=[{"name": "trainer"} | running]),
    ]
    snapshot = await cluster.observe()
    assert [pod.uid for pod in snapshot.training.pods] == ["z", "a"]

    # Both have ended meanwhile; only the status knows which came first.
    cluster.pods[1]["status"] = cluster.pods[0]["status"]
    newest = (await cluster.observe()).training.newest_pod
    assert newest.uid == ("a" if is_known else "z")


async def test_a_spec_that_cannot_be_read_is_explained_in_the_words_of_the_command_line() -> None:
    spec = a_spec().to_wire()
    spec["model"] |= {"magic": True, "quantization": "nf4"}
    spec["training"] = {"batch_size": 2, "epochs": "many"}
    snapshot = await FakeCluster(TRAINER_JOB, spec=spec).observe()
    assert isinstance(snapshot, UnreadableSnapshot)
    assert snapshot.training.job is not None

    object_ = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "bot"}, "spec": spec}
    with pytest.raises(ValidationError) as found:
        validate_document(object_)
    assert snapshot.spec_error == "; ".join(map(str, explain_errors(found.value, object_)))
    assert "spec.model.magic: there is no such field" in snapshot.spec_error
    assert "spec.training.batch_size: there is no such field; did you mean batchSize?" in snapshot.spec_error


async def test_an_unknown_status_leaves_the_spec_readable() -> None:
    assert isinstance(await FakeCluster(status={"fromTheFuture": 1}).observe(), Snapshot)


async def test_a_new_job_writes_where_the_template_says_and_stays_there() -> None:
    new = await FakeCluster().observe()
    moved = "s3://results/former/layout/bot/"
    old = await FakeCluster(status={"resultLocation": moved, "fromTheFuture": 1}).observe()
    assert (new.result_location, new.output_prefix) == ("s3://results/team/bot/", "team/bot")
    assert (old.result_location, old.output_prefix) == (moved, "former/layout/bot")


async def test_the_job_of_preflight_is_asked_for_only_while_it_matters() -> None:
    new, trains, over = FakeCluster(), FakeCluster(TRAINER_JOB), FakeCluster(status={"phase": "Succeeded"})
    for cluster in (new, trains, over):
        await cluster.observe()
    preflight = f"job {preflight_name(METADATA)}"
    assert preflight in new.asked
    assert preflight not in trains.asked
    assert over.asked == [f"job {child_name(METADATA)}"]


@pytest.mark.parametrize("hidden", ["job", "config map", "jobs", "pods"])
async def test_a_child_that_may_not_be_read_is_not_taken_for_missing(hidden: str) -> None:
    cluster = FakeCluster(status={"phase": "Running", "attempts": [{"pod": "x", "uid": "1"}]})
    cluster.hidden = hidden
    snapshot = await cluster.observe()
    assert isinstance(snapshot, BlindSnapshot)
    assert snapshot.refusal == f"the API server refused GET {hidden}: no right"
    assert [attempt.uid for attempt in snapshot.status.attempts] == ["1"]


async def test_pods_are_sorted_to_their_runs_and_an_orphan_is_nobodys() -> None:
    cluster = FakeCluster(PREFLIGHT_JOB)
    gone = {"metadata": {"name": preflight_name(METADATA), "uid": "uid of a deleted Job"}}
    cluster.pods = [
        _pod("2", PREFLIGHT_JOB, created=5),
        _pod("1", PREFLIGHT_JOB),
        _pod("orphan", gone, phase="Running"),
        _pod("ended orphan", gone, phase="Failed"),
    ]
    snapshot = await cluster.observe()
    assert [pod.uid for pod in snapshot.preflight.pods] == ["1", "2"]
    assert snapshot.training.pods == ()
    assert [pod.uid for pod in snapshot.orphaned_pods] == ["orphan"]


async def test_a_pod_that_has_vanished_is_remembered_and_a_live_one_read_anew() -> None:
    cluster, terminated = FakeCluster(TRAINER_JOB), TerminatedPods()
    ended = {"containerStatuses": [{"name": "trainer", "state": {"terminated": {"exitCode": 30}}}]}
    for uid in ("vanished", "alive"):
        terminated.note(_pod(uid, TRAINER_JOB, **ended))
    cluster.pods = [_pod("alive", TRAINER_JOB, created=1, phase="Failed", **ended)]
    snapshot = await cluster.observe(terminated)
    assert [(pod.uid, pod.phase) for pod in snapshot.training.pods] == [("vanished", "Pending"), ("alive", "Failed")]


async def test_a_pod_of_another_namespace_speaks_for_nobody_here() -> None:
    """It has the job's label and the Job as its controller, as anyone can write who may create pods there."""
    terminated = TerminatedPods()
    ended = {"containerStatuses": [{"name": "trainer", "state": {"terminated": {"exitCode": 0, "message": "{}"}}}]}
    forged = _pod("forged", TRAINER_JOB, **ended)
    forged["metadata"]["namespace"] = "team-b"
    terminated.note(forged)
    assert (await FakeCluster(TRAINER_JOB).observe(terminated)).training.pods == ()

    forged["metadata"]["namespace"] = "team"
    terminated.note(forged)
    assert [pod.uid for pod in (await FakeCluster(TRAINER_JOB).observe(terminated)).training.pods] == ["forged"]


async def test_a_report_of_an_older_pod_is_left_out() -> None:
    cluster, reports = FakeCluster(TRAINER_JOB), ReportStore()
    reports.put(METADATA.uid, a_report(pod="1"))
    cluster.pods = [_pod("1", TRAINER_JOB)]
    assert (await cluster.observe(reports=reports)).training.report is not None
    cluster.pods.append(_pod("2", TRAINER_JOB, created=5))
    assert (await cluster.observe(reports=reports)).training.report is None


WAITS_FOR_VOLUMES = {
    "containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "ContainerCreating"}}}],
}
BLOCKERS: dict[str, tuple[list[Json], str, str]] = {
    "a pod that is refused": ([], "FailedCreate", "PodRejected"),
    "a volume that cannot be mounted": ([WAITS_FOR_VOLUMES], "FailedMount", "ContainerConfigError"),
}


@pytest.mark.parametrize(("statuses", "event", "reason"), BLOCKERS.values(), ids=BLOCKERS)
async def test_what_only_events_show(statuses: list[Json], event: str, reason: str) -> None:
    cluster = FakeCluster(TRAINER_JOB)
    cluster.pods = [_pod("1", TRAINER_JOB, **status) for status in statuses]
    assert (await cluster.observe()).blocker is None
    name = TRAINER_JOB["metadata"]["name"]
    cluster.events[event] = [
        {"metadata": {"creationTimestamp": at(1)}, "message": "older"},
        {"metadata": {"creationTimestamp": at(0)}, "lastTimestamp": at(2), "message": f'"{name}-x7k2p" is forbidden'},
    ]
    blocker = (await cluster.observe()).blocker
    assert (blocker.reason, blocker.is_stalled) == (reason, True)
    assert "forbidden" in blocker.message
    assert ("x7k2p" in blocker.message) == (event == "FailedMount")


async def test_a_volume_that_was_mounted_in_the_end_is_no_cause() -> None:
    """The kubelet often fails once, before its caches know the ConfigMap."""
    cluster = FakeCluster(TRAINER_JOB)
    cluster.pods = [_pod("1", TRAINER_JOB, **WAITS_FOR_VOLUMES)]
    failure = {"metadata": {"creationTimestamp": at(0)}, "lastTimestamp": at(5), "message": "no Secret"}
    cluster.events = {"FailedMount": [failure], "Pulling": [failure | {"lastTimestamp": at(7)}]}
    assert (await cluster.observe()).blocker is None

    cluster.events["Pulling"][0]["lastTimestamp"] = at(4)
    assert (await cluster.observe()).blocker.reason == "ContainerConfigError"


async def test_a_refusal_that_is_over_is_not_told_again() -> None:
    """A quota refused an earlier pod: its Event outlives the refusal by an hour."""
    cluster = FakeCluster(TRAINER_JOB)
    cluster.pods = [_pod("1", TRAINER_JOB, created=60, phase="Failed")]
    refusal = {"metadata": {"creationTimestamp": at(0)}, "lastTimestamp": at(30), "message": "forbidden"}
    cluster.events["FailedCreate"] = [refusal]
    assert (await cluster.observe()).blocker is None

    cluster.events["FailedCreate"] = [refusal | {"lastTimestamp": at(90)}]
    assert (await cluster.observe()).blocker.reason == "PodRejected"


def test_the_status_of_a_newer_operator_keeps_what_must_never_be_forgotten() -> None:
    status = read_status({"phase": "Succeeded", "activeSeconds": 7, "fromTheFuture": {"a": 1}})
    assert (status.phase, status.active_seconds) == (Phase.SUCCEEDED, 7)
    assert read_status({"phase": "FromTheFuture"}).phase is None


def test_a_status_of_another_version_keeps_that_the_checks_passed() -> None:
    raw = CHECKED.to_wire() | {"fromTheFuture": {"a": 1}}
    read = read_status(raw)
    assert read.preflight is not None
    assert read.preflight.result is PreflightResult.PASSED
    assert read_status(raw | {"preflight": {"result": "Perhaps"}}).preflight is None


OVER = FineTuneJobStatus(phase=Phase.SUCCEEDED, observed_generation=1)
ASKED: dict[str, tuple[FineTuneJobStatus, Json, list[str]]] = {
    "succeeded": (OVER, {}, []),
    "with a TTL to give": (OVER, {"ttlSecondsAfterFinished": 9}, [f"job {child_name(METADATA)}"]),
    "changed since": (OVER.model_copy(update={"observed_generation": 0}), {}, [f"job {child_name(METADATA)}"]),
    "failed, and its Job may still wait": (
        OVER.model_copy(update={"phase": Phase.FAILED}),
        {},
        [f"job {child_name(METADATA)}"],
    ),
}


@pytest.mark.parametrize(("status", "policy", "asked"), ASKED.values(), ids=ASKED)
async def test_a_job_that_needs_nothing_more_costs_one_request(
    status: FineTuneJobStatus, policy: Json, asked: list[str]
) -> None:
    cluster = FakeCluster(TRAINER_JOB, spec=a_spec(runPolicy=policy).to_wire(), status=status.to_wire())
    await cluster.observe()
    assert cluster.asked == asked
