"""Reading a job: which requests are made, whose pods they are, and what only Events show."""

import pytest
from pydantic import ValidationError

from finetune_api import API_VERSION, KIND
from finetune_api.base import Json
from finetune_api.explain import explain_errors
from finetune_api.job import validate_document
from finetune_api.status import FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import Phase, PreflightResult
from finetune_operator.desired.names import child_name, preflight_name
from finetune_operator.desired.preflight_job import build_preflight_job
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_operator.observe.observe import read_status
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.snapshot import BlindSnapshot, Snapshot, UnreadableSnapshot
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_test_operator.observed_job import FakeCluster, a_child_pod
from finetune_test_operator.snapshot_builder import METADATA, a_report, a_spec, at

CHECKED = FineTuneJobStatus(phase=Phase.QUEUED, preflight=PreflightStatus(result=PreflightResult.PASSED))
TRAINER_JOB = build_trainer_job(METADATA, a_spec(), "image", "config")
PREFLIGHT_JOB = build_preflight_job(METADATA, a_spec(), "image", "config")


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
        a_child_pod("z", TRAINER_JOB, phase="Failed", containerStatuses=[{"name": "trainer"} | ended]),
        a_child_pod("a", TRAINER_JOB, phase="Running", containerStatuses=[{"name": "trainer"} | running]),
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
        a_child_pod("2", PREFLIGHT_JOB, created=5),
        a_child_pod("1", PREFLIGHT_JOB),
        a_child_pod("orphan", gone, phase="Running"),
        a_child_pod("ended orphan", gone, phase="Failed"),
    ]
    snapshot = await cluster.observe()
    assert [pod.uid for pod in snapshot.preflight.pods] == ["1", "2"]
    assert snapshot.training.pods == ()
    assert [pod.uid for pod in snapshot.orphaned_pods] == ["orphan"]


async def test_a_pod_that_has_vanished_is_remembered_and_a_live_one_read_anew() -> None:
    cluster, terminated = FakeCluster(TRAINER_JOB), TerminatedPods()
    ended = {"containerStatuses": [{"name": "trainer", "state": {"terminated": {"exitCode": 30}}}]}
    for uid in ("vanished", "alive"):
        terminated.note(a_child_pod(uid, TRAINER_JOB, **ended))
    cluster.pods = [a_child_pod("alive", TRAINER_JOB, created=1, phase="Failed", **ended)]
    snapshot = await cluster.observe(terminated)
    assert [(pod.uid, pod.phase) for pod in snapshot.training.pods] == [("vanished", "Pending"), ("alive", "Failed")]


async def test_a_pod_of_another_namespace_speaks_for_nobody_here() -> None:
    """It has the job's label and the Job as its controller, as anyone can write who may create pods there."""
    terminated = TerminatedPods()
    ended = {"containerStatuses": [{"name": "trainer", "state": {"terminated": {"exitCode": 0, "message": "{}"}}}]}
    forged = a_child_pod("forged", TRAINER_JOB, **ended)
    forged["metadata"]["namespace"] = "team-b"
    terminated.note(forged)
    assert (await FakeCluster(TRAINER_JOB).observe(terminated)).training.pods == ()

    forged["metadata"]["namespace"] = "team"
    terminated.note(forged)
    assert [pod.uid for pod in (await FakeCluster(TRAINER_JOB).observe(terminated)).training.pods] == ["forged"]


async def test_a_report_of_an_older_pod_is_left_out() -> None:
    cluster, reports = FakeCluster(TRAINER_JOB), ReportStore()
    reports.put(METADATA.uid, a_report(pod="1"))
    cluster.pods = [a_child_pod("1", TRAINER_JOB)]
    assert (await cluster.observe(reports=reports)).training.report is not None
    cluster.pods.append(a_child_pod("2", TRAINER_JOB, created=5))
    assert (await cluster.observe(reports=reports)).training.report is None


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
