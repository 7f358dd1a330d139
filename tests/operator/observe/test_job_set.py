"""Whose a Job is that a JobSet made: UIDs lead from the Job to the FineTuneJob, and nothing else does."""

from typing import Any

import pytest

from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import Phase
from finetune_operator.desired.job_set import build_job_set
from finetune_operator.desired.names import TRAINER, job_set_job_name, job_set_name
from finetune_operator.observe.children import ChildJob
from finetune_operator.observe.job_set import JobSet
from finetune_operator.observe.snapshot import ChildRun, Snapshot
from finetune_test_operator.snapshot_builder import METADATA, NOW, a_snapshot, a_spec, a_trainer_job, at, decision_about

SPEC = a_spec(resources={"nodes": 2, "multiNode": "JobSet"}, runPolicy={"ttlSecondsAfterFinished": 60})
SET_UID, SET, JOB = "set-uid", job_set_name(METADATA), job_set_job_name(METADATA)


def _parsed(uid: str = SET_UID, owner: str | None = METADATA.uid, deleting: bool = False) -> JobSet:
    """The JobSet as the API server returns it."""
    body = build_job_set(METADATA, SPEC, "image", "config")
    body["metadata"] |= {"uid": uid} | ({"deletionTimestamp": at(0)} if deleting else {})
    body["metadata"]["ownerReferences"][0] |= {"uid": owner, "controller": owner is not None}
    return JobSet.parse(body)


def _job(controller: str | None = SET_UID, **changes: Any) -> ChildJob:
    return a_trainer_job(SPEC, owner=controller, name=JOB, **changes)


def _seen(job: ChildJob | None, job_set: JobSet | None, **fields: Any) -> Snapshot:
    return a_snapshot(SPEC, training=ChildRun(TRAINER, job, job_set=job_set), **fields)


OURS = {
    "the set and its Job": (_job(), _parsed()),
    "the set, whose Job is not made yet": (None, _parsed()),
    "the set, whose Job is gone for good": (None, _parsed(deleting=True)),
    "a Job without a set": (_job(METADATA.uid), None),
}


@pytest.mark.parametrize(("job", "job_set"), OURS.values(), ids=OURS)
def test_a_chain_of_uids_makes_a_job_ours(job: ChildJob | None, job_set: JobSet | None) -> None:
    assert _seen(job, job_set).foreign_child is None


FOREIGN = {
    "a set of the FineTuneJob that had the name before": (_job(), _parsed(owner="former-uid"), f"JobSet {SET}"),
    "a set that nobody owns": (_job(), _parsed(owner=None), f"JobSet {SET}"),
    "a stranger's set without a Job": (None, _parsed(owner="stranger"), f"JobSet {SET}"),
    "a Job of a set that was made again under its name": (_job("former-set"), _parsed(), f"Job {JOB}"),
    "a Job of a set that is gone": (_job(), None, f"Job {JOB}"),
    "a Job of a stranger under the name": (_job("stranger"), _parsed(), f"Job {JOB}"),
}


@pytest.mark.parametrize(("job", "job_set", "name"), FOREIGN.values(), ids=FOREIGN)
def test_a_chain_that_breaks_is_a_conflict_of_names(job: ChildJob | None, job_set: JobSet | None, name: str) -> None:
    seen = _seen(job, job_set)
    assert seen.foreign_child == name

    decision = decision_about(seen)
    assert (decision.reason, decision.is_stalled) == ("NameConflict", True)
    assert name in decision.message


def test_a_name_and_labels_alone_make_nothing_ours() -> None:
    # All that could be read of it without its UID is what the operator itself would have written.
    body = build_job_set(METADATA, SPEC, "image", "config")
    del body["metadata"]["ownerReferences"]
    forged = JobSet.parse(body | {"metadata": body["metadata"] | {"uid": SET_UID}})
    assert _seen(_job(), forged).foreign_child == f"JobSet {SET}"


@pytest.mark.parametrize(
    ("job_set", "is_ended"),
    [(_parsed(), True), (_parsed(owner="former-uid"), False), (_parsed("another-set"), False), (None, False)],
    ids=["our set's", "another job's set's", "another set's", "no set's"],
)
def test_only_our_sets_job_is_ended_with_the_job(job_set: JobSet | None, is_ended: bool) -> None:
    seen = _seen(_job(started=NOW), job_set, status=FineTuneJobStatus(phase=Phase.FAILED))
    ended = {"spec": {"activeDeadlineSeconds": 1}}
    assert decision_about(seen).actions.patch_trainer_job == (ended if is_ended else None)
