"""A run whose Job a JobSet makes: which of the two is made, suspended, ended and waited for."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import QUEUE_LABEL, Phase
from finetune_operator.decide.decide import decide
from finetune_operator.desired.job_set import build_job_set
from finetune_operator.desired.names import TRAINER, job_set_job_name, job_set_name
from finetune_operator.desired.peers import build_network_policy, build_service
from finetune_operator.observe.children import ChildJob, TrueCondition
from finetune_operator.observe.gpu_use import holds_gpus
from finetune_operator.observe.job_set import JobSet, take_from_set
from finetune_operator.observe.snapshot import ChildRun, GpuUse, GpuUser, Peers, Snapshot
from finetune_test_operator.snapshot_builder import (
    INSTALLATION,
    LIMITED,
    METADATA,
    NOW,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    decision_about,
)

SET, JOB = job_set_name(METADATA), job_set_job_name(METADATA)
ACTIVE_SECONDS, ACTIVE_SINCE = "finetune.dev/active-seconds", "finetune.dev/active-since"


def _spec(run_policy: dict[str, Any] | None = None, **sections: Any) -> FineTuneJobSpec:
    policy = {"preflight": "Skip"} | (run_policy or {})
    return a_spec(resources={"nodes": 2, "multiNode": "JobSet"}, runPolicy=policy, **sections)


SPEC, PAUSED = _spec(), _spec({"suspend": True})


def _set(spec: FineTuneJobSpec = SPEC, **changes: Any) -> JobSet:
    body = build_job_set(METADATA, spec, "image", "config")
    body["metadata"]["uid"] = "set-uid"
    return replace(JobSet.parse(body), **changes)


def _job(spec: FineTuneJobSpec = SPEC, controller: str = "set-uid", **changes: Any) -> ChildJob:
    job = a_trainer_job(spec, owner=controller, **changes)
    reference = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": SET, "uid": controller}
    job.body["metadata"]["ownerReferences"] = [reference | {"controller": True}]
    return job


def _seen(
    job: ChildJob | None, job_set: JobSet | None, spec: FineTuneJobSpec = SPEC, pods: Any = (), **fields: Any
) -> Snapshot:
    run = ChildRun(TRAINER, job, pods, job_set=job_set)
    return a_snapshot(
        spec, training=run, peers=Peers(build_service(METADATA), build_network_policy(METADATA)), **fields
    )


def test_the_set_is_made_and_no_job() -> None:
    actions = decide(_seen(None, None), INSTALLATION).actions
    assert actions.create_trainer_job is None
    assert actions.create_job_set is not None
    assert (actions.create_job_set["metadata"]["name"], actions.create_job_set["spec"]["suspend"]) == (SET, False)
    assert actions.starts_training


def test_where_gpus_are_counted_the_set_is_resumed_once_its_job_shows() -> None:
    use = GpuUse(4)
    made = decide(_seen(None, None, gpu_use=use), LIMITED).actions
    assert made.create_job_set is not None
    assert made.create_job_set["spec"]["suspend"] is True
    assert not made.starts_training

    held = _set(suspended=True)
    assert decide(_seen(None, held, gpu_use=use), LIMITED).actions.patch_job_set is None
    resumed = decide(_seen(_job(suspended=True, started=None), held, gpu_use=use), LIMITED).actions
    assert resumed.patch_job_set == {"spec": {"suspend": False}}
    assert resumed.starts_training

    full = GpuUse(4, (GpuUser("other", 4),))
    waits = decide(_seen(_job(suspended=True, started=None), held, gpu_use=full), LIMITED)
    assert (waits.reason, waits.actions.patch_job_set) == ("GpuLimitReached", None)


@pytest.mark.parametrize(
    ("set_suspended", "job_suspended", "holds"),
    [(False, True, True), (False, False, True), (True, True, False)],
    ids=["it is about to be resumed", "it runs", "it is held"],
)
def test_who_holds_gpus_is_seen_from_the_set_first(set_suspended: bool, job_suspended: bool, holds: bool) -> None:
    assert holds_gpus(_job(suspended=job_suspended), _set(suspended=set_suspended)) is holds
    assert not holds_gpus(_job(complete=TrueCondition("", "", NOW)), _set(suspended=set_suspended))


def test_what_is_missing_is_said_before_anything_is_made() -> None:
    decision = decision_about(_seen(None, None, job_set_problem="this cluster does not serve it"))
    assert (decision.reason, decision.is_stalled, decision.requeue_seconds) == ("JobSetUnavailable", True, 30)
    assert "multiNode: Job" in decision.message
    assert not decision.actions.creates


def test_a_set_without_a_job_is_waited_for_and_not_made_twice() -> None:
    decision = decision_about(_seen(None, _set()))
    assert (decision.phase, decision.actions.creates) == (Phase.QUEUED, False)
    assert SET in decision.message
    assert decision_about(_seen(None, _set(), PAUSED)).actions.patch_job_set == {"spec": {"suspend": True}}

    over = decision_about(_seen(None, _set(is_over=True)))
    assert (over.reason, over.is_stalled) == ("JobSetUnavailable", True)
    assert f"kubectl delete jobset {SET}" in over.message


def test_suspension_is_told_to_the_set_and_the_job_keeps_a_note_of_its_start() -> None:
    running = _job(started=NOW)
    actions = decision_about(_seen(running, _set(), PAUSED, (a_running_pod(),))).actions
    assert actions.patch_job_set == {"spec": {"suspend": True}}
    noted = {ACTIVE_SECONDS: "0", ACTIVE_SINCE: NOW.isoformat()}
    assert actions.patch_trainer_job == {"metadata": {"annotations": noted}}

    # JobSet has suspended it, and the Job controller has forgotten its start.
    held = _job(PAUSED, started=None, suspended=True, noted_start=NOW, suspension=TrueCondition("", "", NOW))
    later = {"now": NOW + timedelta(seconds=40)}
    actions = decision_about(_seen(held, _set(suspended=True), PAUSED, **later)).actions
    assert actions.patch_job_set is None
    assert actions.patch_trainer_job == {"metadata": {"annotations": {ACTIVE_SECONDS: "0", ACTIVE_SINCE: None}}}


def test_only_kueue_resumes_what_it_holds() -> None:
    held = _seen(_job(suspended=True, started=None), _set(suspended=True))
    assert decision_about(held).actions.patch_job_set == {"spec": {"suspend": False}}
    by_kueue = _seen(_job(suspended=True, started=None), _set(suspended=True, is_held_by_kueue=True))
    assert decision_about(by_kueue).actions.patch_job_set is None
    in_queue = _seen(_job(suspended=True, started=None, queue="gpus"), _set(suspended=True, queue="gpus"))
    assert decision_about(in_queue).actions.patch_job_set is None


def test_the_ttl_is_the_sets() -> None:
    spec, over = _spec({"ttlSecondsAfterFinished": 60}), TrueCondition("", "", NOW)
    status = FineTuneJobStatus(phase=Phase.SUCCEEDED)
    ending = decision_about(_seen(_job(spec, complete=over), _set(), spec, status=status))
    assert (ending.actions.patch_job_set, ending.requeue_seconds) == (None, 30)
    ended = decision_about(_seen(_job(spec, complete=over), _set(is_over=True), spec, status=status))
    assert ended.actions.patch_job_set == {"spec": {"ttlSecondsAfterFinished": 60}}
    assert (ended.actions.patch_trainer_job, ended.requeue_seconds) == (None, None)


@pytest.mark.parametrize(("owner", "is_stopped"), [(METADATA.uid, True), ("stranger", False)])
def test_a_job_that_is_over_gets_no_job_from_its_set(owner: str, is_stopped: bool) -> None:
    failed = FineTuneJobStatus(phase=Phase.FAILED)
    actions = decision_about(_seen(None, _set(owner_uid=owner), status=failed)).actions
    assert actions.patch_job_set == ({"spec": {"suspend": True}} if is_stopped else None)


@pytest.mark.parametrize("job_set", [None, _set(uid="new-uid")], ids=["gone", "made again"])
def test_a_job_that_a_deleted_set_left_behind_is_waited_for(job_set: JobSet | None) -> None:
    left = take_from_set(_job(), job_set, SET, 0, NOW)
    assert left.deleting
    decision = decision_about(_seen(left, job_set))
    assert (decision.reason, decision.is_stalled, decision.actions.creates) == ("JobDeleted", False, False)

    stranger = a_trainer_job(SPEC, owner="stranger", name=JOB)
    assert decision_about(_seen(take_from_set(stranger, job_set, SET, 0, NOW), job_set)).reason == "NameConflict"


def test_a_set_that_is_being_deleted_is_waited_for() -> None:
    decision = decision_about(_seen(_job(), _set(deleting=True)))
    assert (decision.reason, decision.is_stalled) == ("JobDeleted", False)
    assert f"JobSet {SET}" in decision.message


def test_a_queue_holds_the_set_and_its_job_says_so() -> None:
    spec = _spec(scheduling={"queueName": "gpus"})
    body = build_job_set(METADATA, spec, "image", "config")
    body["metadata"]["uid"] = "set-uid"
    job_set = JobSet.parse(body)
    child = replace(_job(spec), queue=None)
    assert QUEUE_LABEL not in body["spec"]["replicatedJobs"][0]["template"]["metadata"]["labels"]

    taken = take_from_set(child, job_set, SET, 0, NOW)
    assert (taken.queue, taken.queued_uid, taken.waits_in_queue) == ("gpus", "set-uid", True)
    assert "job-uid=set-uid" in decision_about(_seen(taken, job_set, spec)).message


SECONDS = {
    "the first Job": ({"active_seconds": 5, "started": NOW - timedelta(seconds=10)}, 15, 5),
    "a Job that was made again": ({"active_seconds": 0, "started": NOW}, 900, 900),
    "a Job that was made again, seen late": ({"active_seconds": 0, "started": NOW - timedelta(seconds=10)}, 900, 890),
    "a Job with a note": ({"active_seconds": 0, "started": NOW, "noted_start": NOW}, 900, 0),
}


@pytest.mark.parametrize(("job", "known", "expected"), SECONDS.values(), ids=SECONDS)
def test_a_job_that_was_made_again_has_run_as_long_as_the_status_says(
    job: dict[str, Any], known: int, expected: int
) -> None:
    taken = take_from_set(_job(**job), _set(), SET, known, NOW)
    assert taken.active_seconds == expected
    assert taken.active_seconds_at(NOW) <= max(known, 15)
