"""What still runs under a job's name: whose it is by more than a label, and what says nothing."""

from dataclasses import replace
from typing import Any

import pytest

from finetune_api.base import Json
from finetune_api.status import Attempt
from finetune_operator.desired.names import child_name, job_set_job_name, job_set_name, preflight_name
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.job_set import JobSet
from finetune_operator.observe.leftovers import find_orphaned_pods, find_predecessor
from finetune_operator.observe.snapshot import Predecessor
from finetune_test_operator.snapshot_builder import METADATA, a_spec, at

FORMER = METADATA.model_copy(update={"uid": "former-uid"})
NAME = child_name(FORMER)


def _pod(controller: str | None, uid: str = "pod", job_uid: str | None = METADATA.uid, **fields: Any) -> Json:
    labels = {"finetune.dev/job-uid": job_uid} if job_uid else {}
    metadata: Json = {"name": f"name-of-{uid}", "uid": uid, "labels": labels, "creationTimestamp": at(0)}
    if controller:
        metadata["ownerReferences"] = [{"kind": "Job", "name": controller, "uid": "job-uid", "controller": True}]
    return {"metadata": metadata, "status": {"phase": "Running"} | fields}


ORPHANS = {
    "a pod of the deleted trainer's Job": (_pod(child_name(METADATA)), True),
    "a pod of the deleted preflight's Job": (_pod(preflight_name(METADATA)), True),
    "an attempt whose Job was deleted with --cascade=orphan": (_pod(None, uid="attempt"), True),
    "a pod of the deleted Job of a JobSet": (_pod(job_set_job_name(METADATA)), True),
    "a pod of the JobSet of another FineTuneJob": (_pod(job_set_job_name(FORMER)), False),
    "one that has ended": (_pod(child_name(METADATA), phase="Failed"), False),
    "a stranger's pod with our label": (_pod(None), False),
    "a pod of a stranger's Job with our label": (_pod("loadtest"), False),
}


@pytest.mark.parametrize(("pod", "counts"), ORPHANS.values(), ids=ORPHANS)
def test_only_pods_that_our_jobs_made_are_orphans(pod: Json, counts: bool) -> None:
    found = find_orphaned_pods(METADATA, (Attempt(pod="x", uid="attempt"),), (TrainerPod.parse(pod),))
    assert bool(found) == counts


def _job(owner: bool = True, deleting: bool = False, name: str = NAME, **changes: Any) -> Json:
    body = build_trainer_job(FORMER, a_spec(), "image", "config")
    body["metadata"] |= {"uid": "job-uid", "name": name} | ({"deletionTimestamp": at(0)} if deleting else {})
    if not owner:
        body["metadata"]["ownerReferences"] = []
    body["spec"] |= {"suspend": False} | changes.pop("spec", {})
    return body | {"status": changes.pop("status", {"startTime": at(0)})}


THEIRS = _pod(NAME, job_uid="former-uid")
ENDED = {"conditions": [{"type": "Complete", "status": "True"}]}
PREDECESSORS: dict[str, tuple[list[Json], list[Json], Predecessor | None]] = {
    "its pod, which is being stopped": ([], [THEIRS], Predecessor(NAME, "name-of-pod")),
    "its pod, before the garbage collector came": ([_job()], [THEIRS], Predecessor(NAME, "name-of-pod")),
    "its pod, with a Job that was kept": (
        [_job(owner=False)],
        [THEIRS],
        Predecessor(NAME, "name-of-pod", f"job {NAME}"),
    ),
    "a Job that was kept, between two attempts": ([_job(owner=False)], [], Predecessor(NAME, None, f"job {NAME}")),
    "a Job that was kept and is being deleted now": (
        [_job(owner=False, deleting=True)],
        [],
        Predecessor(NAME, None),
    ),
    "a Job that was kept and has ended": ([_job(owner=False, status=ENDED)], [], None),
    "a Job that was kept and is suspended": ([_job(owner=False, spec={"suspend": True})], [], None),
    "a Job with another name": ([_job(owner=False, name="bot-copy")], [], None),
    "a pod of another Job": ([], [_pod("bot-copy", job_uid="former-uid")], None),
    "a stranger's pod": ([], [_pod(None, job_uid="former-uid")], None),
    "a pod without the label": ([], [_pod(NAME, job_uid=None)], None),
    "our own pod": ([], [_pod(child_name(METADATA))], None),
    "nothing": ([], [], None),
}


@pytest.mark.parametrize(("jobs", "pods", "found"), PREDECESSORS.values(), ids=PREDECESSORS)
def test_a_predecessor_is_known_by_the_names_of_its_children(
    jobs: list[Json], pods: list[Json], found: Predecessor | None
) -> None:
    assert find_predecessor(METADATA, jobs, pods) == found


SET_JOB, SET = job_set_job_name(FORMER), job_set_name(FORMER)


def _in_a_set(uid: str = "set-uid", **changes: Any) -> Json:
    """The Job that a JobSet of the predecessor made."""
    body = _job(name=SET_JOB, **changes)
    body["metadata"]["ownerReferences"] = [{"kind": "JobSet", "name": SET, "uid": uid, "controller": True}]
    return body


KEPT = JobSet(SET, "set-uid", owner_uid=None, deleting=False)
SETS: dict[str, tuple[Json, JobSet | None, Predecessor | None]] = {
    "a JobSet that was kept": (_in_a_set(), KEPT, Predecessor(SET_JOB, None, f"jobset {SET}")),
    "a JobSet that was kept and is being deleted now": (
        _in_a_set(),
        replace(KEPT, deleting=True),
        Predecessor(SET_JOB, None),
    ),
    "a JobSet that the garbage collector will find": (
        _in_a_set(),
        replace(KEPT, owner_uid="former-uid"),
        Predecessor(SET_JOB, None),
    ),
    "another JobSet, of the same name": (_in_a_set("older-set"), KEPT, Predecessor(SET_JOB, None)),
    "a JobSet that is gone already": (_in_a_set(), None, Predecessor(SET_JOB, None)),
    "a Job that was kept without its JobSet": (
        _job(owner=False, name=SET_JOB),
        None,
        Predecessor(SET_JOB, None, f"job {SET_JOB}"),
    ),
    "a JobSet whose Job has ended": (_in_a_set(status=ENDED), KEPT, None),
}


@pytest.mark.parametrize(("job", "job_set", "found"), SETS.values(), ids=SETS)
def test_of_a_predecessor_in_a_job_set_the_set_is_what_to_delete(
    job: Json, job_set: JobSet | None, found: Predecessor | None
) -> None:
    sets = [job_set] if job_set else []
    assert find_predecessor(METADATA, [job], [], sets) == found

    # Its pod is found by the same chain.
    pod = _pod(SET_JOB, job_uid="former-uid")
    kept = found.kept if found else f"jobset {SET}"
    assert find_predecessor(METADATA, [job], [pod], sets) == Predecessor(SET_JOB, "name-of-pod", kept)
