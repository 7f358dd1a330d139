"""The main path against a cluster given by the test: when it locks reports, and which refusals it swallows."""

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest

from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_api.outcome import Outcome, Result
from finetune_api.vocabulary import JOB_UID_LABEL
from finetune_operator.cluster.cluster import NamespacedName
from finetune_operator.desired.names import child_name
from finetune_operator.errors import ApiError, ConflictError, ForbiddenError, NotFoundError
from finetune_operator.gpu_line import GpuLine
from finetune_operator.observe import report_store
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.reconcile import Reconciler
from finetune_test_operator.snapshot_builder import (
    INSTALLATION,
    LOCATION,
    METADATA,
    NOW,
    a_config_map,
    a_report,
    a_spec,
    a_trainer_job,
    at,
)

KEY = NamespacedName("team", "bot")
SUCCEEDED = Outcome(result=Result.SUCCEEDED, finished=NOW, manifest_uri=f"{LOCATION}manifest.json")


class FakeCluster:
    """One job; it keeps statuses, and each kind of write can be made to fail."""

    def __init__(self, reports: ReportStore) -> None:
        self.reports = reports
        self.gpu_users = None
        self.queues = None  # nothing here is in one
        self.job: Json = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {
                "name": "bot",
                "namespace": "team",
                "uid": METADATA.uid,
                "generation": 1,
                "resourceVersion": "7",
            },
            "spec": a_spec().to_wire(),
        }

        self.child: Json | None = None
        self.preflight: Json | None = None
        self.config_map: Json | None = None
        self.pods: list[Json] = []
        self.failures: dict[str, ApiError] = {}
        self.reads: list[str] = []
        self.writes: list[str] = []
        self.version = ""
        """Version of the job that the last status was written for."""

        self.was_locked = False
        self.meanwhile: Callable[[], None] = lambda: None
        """Called while the job's children are read."""

    def give_children(self) -> None:
        """Create what a first reconcile creates."""
        self.config_map = a_config_map()
        self.child = a_trainer_job().body

    def end_the_pod(self) -> None:
        terminated = {"exitCode": 0, "message": SUCCEEDED.encode(), "startedAt": at(1), "finishedAt": at(10)}
        self.pods = [_pod("Succeeded", {"terminated": terminated})]

    def run_the_pod(self) -> None:
        running = {"startedAt": at(-1)}
        self.pods = [_pod("Running", {"running": running})]

    def now(self) -> datetime:
        return NOW

    async def get_fine_tune_job(self, key: NamespacedName) -> Json | None:
        self.reads.append("job")
        return self.job

    async def list_jobs(self, name: NamespacedName) -> list[Json]:
        self.meanwhile()  # children are read
        return []

    async def get_job(self, namespace: str, name: str) -> Json | None:
        return self.child if name == child_name(METADATA) else self.preflight

    async def get_config_map(self, namespace: str, name: str) -> Json | None:
        return self.config_map

    async def list_pods(self, name: NamespacedName) -> list[Json]:
        self.reads.append("pods")
        return self.pods

    async def list_events(self, namespace: str, uid: str, reason: str) -> list[Json]:
        return []

    async def create_config_map(self, config_map: Json) -> None:
        self._write("create_config_map")
        self.config_map = config_map

    async def create_job(self, job: Json) -> None:
        self._write("create_job")

    async def patch_job(self, job: Json, changes: Json) -> None:
        self._write("patch_job")
        self.child = job | {"spec": job["spec"] | changes["spec"]}

    async def create_event(self, event: Json) -> None:
        self._write("create_event")

    async def apply_status(self, job: ObjectMeta, status: Json) -> str:
        self.was_locked = self.reports.is_locked(job.uid)
        self._write("apply_status")
        self.version = job.resource_version
        self.job["status"] = status
        return "8"

    def _write(self, name: str) -> None:
        self.writes.append(name)
        if name in self.failures:
            raise self.failures[name]


def _pod(phase: str, state: Json) -> Json:
    owner = {"kind": "Job", "name": "bot-1", "uid": "child-uid", "controller": True}
    metadata = {"name": "p", "uid": "pod-1", "creationTimestamp": at(-2), "ownerReferences": [owner]}
    status = {"phase": phase, "containerStatuses": [{"name": "trainer", "state": state}]}
    return {"metadata": metadata | {"labels": {JOB_UID_LABEL: METADATA.uid}}, "status": status}


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(ReportStore())


@pytest.fixture
def reconciler(cluster: FakeCluster) -> Reconciler:
    return Reconciler(cluster, INSTALLATION, cluster.reports, TerminatedPods(), GpuLine())  # type: ignore[arg-type]


async def test_children_come_before_the_event_and_the_status(reconciler: Reconciler, cluster: FakeCluster) -> None:
    await reconciler.reconcile(KEY)
    assert cluster.writes == ["create_config_map", "create_job", "create_event", "apply_status"]


async def test_a_second_look_writes_nothing(reconciler: Reconciler, cluster: FakeCluster) -> None:
    cluster.give_children()
    await reconciler.reconcile(KEY)
    cluster.writes.clear()
    await reconciler.reconcile(KEY)
    assert cluster.writes == []


async def test_its_own_write_is_known_until_the_job_changes_again(reconciler: Reconciler, cluster: FakeCluster) -> None:
    assert not reconciler.wrote(METADATA.uid, "8")
    await reconciler.reconcile(KEY)
    assert reconciler.wrote(METADATA.uid, "8")
    assert not reconciler.wrote(METADATA.uid, "9")
    assert not reconciler.wrote("another", "8")
    reconciler.forget(METADATA.uid)
    assert not reconciler.wrote(METADATA.uid, "8")


async def test_a_report_costs_a_running_job_one_request_the_write(
    reconciler: Reconciler, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_store, "SHOW_SECONDS", 0)
    cluster.give_children()
    cluster.run_the_pod()
    cluster.reports.put(METADATA.uid, a_report(9))
    await reconciler.reconcile(KEY)
    assert cluster.job["status"]["phase"] == "Running"

    cluster.reads.clear()
    cluster.writes.clear()
    cluster.reports.put(METADATA.uid, a_report(10, step=10))
    await reconciler.reconcile(KEY, has_changed=False)
    assert cluster.job["status"]["progress"]["step"] == 10
    assert (cluster.reads, cluster.writes) == ([], ["apply_status"])
    assert cluster.version == "8", "the write names the version after the one before"

    await reconciler.reconcile(KEY, has_changed=False)
    assert (cluster.reads, cluster.writes) == ([], ["apply_status"]), "the same report is no news"


@pytest.mark.parametrize("why", ["something changed", "the write failed", "the job is to be stopped"])
async def test_a_job_is_read_again_if_more_than_its_report_may_be_new(
    reconciler: Reconciler, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(report_store, "SHOW_SECONDS", 0)
    cluster.give_children()
    cluster.run_the_pod()
    if why == "the job is to be stopped":
        cluster.job["spec"]["runPolicy"] = {"maxGpuSeconds": 60}
        await reconciler.reconcile(KEY)  # the Job gets its deadline
    cluster.reports.put(METADATA.uid, a_report(9))
    await reconciler.reconcile(KEY)

    cluster.reports.put(METADATA.uid, a_report(10, step=10))
    if why == "the write failed":
        cluster.failures["apply_status"] = ConflictError(409, "PATCH", "changed")
        with pytest.raises(ConflictError):
            await reconciler.reconcile(KEY, has_changed=False)
        del cluster.failures["apply_status"]
    if why == "the job is to be stopped":
        monkeypatch.setattr(cluster, "now", lambda: NOW + timedelta(hours=1))

    cluster.reads.clear()
    await reconciler.reconcile(KEY, has_changed=why == "something changed")
    assert "pods" in cluster.reads


async def test_reports_are_locked_before_the_terminal_status_and_the_last_one_is_in_it(
    reconciler: Reconciler, cluster: FakeCluster
) -> None:
    cluster.give_children()
    await reconciler.reconcile(KEY)
    assert not cluster.was_locked
    cluster.end_the_pod()
    cluster.reports.put(METADATA.uid, a_report(9, learningRate=0.5))
    await reconciler.reconcile(KEY)
    assert cluster.was_locked
    assert cluster.job["status"]["progress"]["learningRate"] == 0.5
    assert cluster.reports.newest(METADATA.uid) is None
    assert cluster.reports.is_locked(METADATA.uid)


async def test_a_job_that_succeeded_needs_nothing_more_until_its_spec_changes(
    reconciler: Reconciler, cluster: FakeCluster
) -> None:
    cluster.give_children()
    cluster.end_the_pod()
    await reconciler.reconcile(KEY)
    assert not reconciler.is_settled(METADATA.uid), "its Job may still need a TTL"
    await reconciler.reconcile(KEY)
    assert reconciler.is_settled(METADATA.uid)

    cluster.job["spec"]["runPolicy"] = {"ttlSecondsAfterFinished": 60}
    cluster.job["metadata"]["generation"] = 2
    await reconciler.reconcile(KEY)
    assert not reconciler.is_settled(METADATA.uid)


async def test_a_terminal_status_that_could_not_be_written_keeps_the_report(
    reconciler: Reconciler, cluster: FakeCluster
) -> None:
    cluster.give_children()
    cluster.end_the_pod()
    cluster.reports.put(METADATA.uid, a_report(9))
    cluster.failures["apply_status"] = ConflictError(409, "PATCH", "changed")
    with pytest.raises(ConflictError):
        await reconciler.reconcile(KEY)
    assert cluster.reports.newest(METADATA.uid) is not None


async def test_a_job_deleted_meanwhile_is_no_error(reconciler: Reconciler, cluster: FakeCluster) -> None:
    cluster.failures["apply_status"] = NotFoundError(404, "PATCH", "gone")
    assert await reconciler.reconcile(KEY) is None


@pytest.mark.parametrize("is_deleted", [True, False])
async def test_a_job_that_was_deleted_or_changed_while_its_children_were_read_gets_none(
    reconciler: Reconciler, cluster: FakeCluster, is_deleted: bool
) -> None:
    changed = cluster.job | {"metadata": cluster.job["metadata"] | {"resourceVersion": "8"}}

    def change() -> None:
        cluster.job = None if is_deleted else changed  # type: ignore[assignment]

    cluster.meanwhile = change
    with pytest.raises(ConflictError, match="while its children were read"):
        await reconciler.reconcile(KEY)
    assert cluster.writes == []


REFUSALS = {
    "a missing right": (ForbiddenError(403, "POST /jobs", "no"), "PermissionDenied"),
    "an invalid object": (ApiError(422, "POST /jobs", "spec is wrong"), "ChildRejected"),
}


@pytest.mark.parametrize(("error", "reason"), REFUSALS.values(), ids=REFUSALS)
async def test_a_refused_child_is_reported_and_tried_again(
    reconciler: Reconciler, cluster: FakeCluster, error: ApiError, reason: str
) -> None:
    cluster.failures["create_job"] = error
    assert await reconciler.reconcile(KEY) is not None
    stalled = next(each for each in cluster.job["status"]["conditions"] if each["type"] == "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", reason)
    assert error.message in stalled["message"]


async def test_a_name_that_was_taken_meanwhile_is_looked_at_again(reconciler: Reconciler, cluster: FakeCluster) -> None:
    cluster.failures["create_job"] = ConflictError(409, "POST /jobs", "exists")
    with pytest.raises(ConflictError):
        await reconciler.reconcile(KEY)
    assert "status" not in cluster.job


async def test_an_event_that_was_posted_before_is_no_error(reconciler: Reconciler, cluster: FakeCluster) -> None:
    cluster.failures["create_event"] = ConflictError(409, "POST /events", "exists")
    await reconciler.reconcile(KEY)
    assert cluster.job["status"]["phase"] == "Validating"
