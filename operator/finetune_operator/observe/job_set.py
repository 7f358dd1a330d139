"""The JobSet between a FineTuneJob and the trainer's Job: what it says, and whose both are.

Only UIDs say so. Two JobSets may have had one name, and anybody may write a label. No watch of ours announces a JobSet;
what happens to it shows in its Job.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol, Self

from finetune_api.base import Json
from finetune_api.vocabulary import QUEUE_LABEL
from finetune_operator.desired.job_set import API_VERSION
from finetune_operator.desired.names import controller_uid, controlling_job_set
from finetune_operator.observe.children import ChildJob, is_suspended_by, true_condition


class JobSetReader(Protocol):
    """Requests about JobSets, as `JobSets` sends them."""

    async def get(self, namespace: str, name: str) -> Json | None: ...
    async def are_served(self) -> bool: ...


@dataclass(frozen=True)
class JobSet:
    """A JobSet, as far as the operator has to do with it."""

    name: str
    uid: str
    owner_uid: str | None
    """UID of the object that controls it; None if no object does, as after a deletion with `--cascade=orphan`."""

    deleting: bool
    suspended: bool = False
    queue: str | None = None
    """Kueue's LocalQueue, which alone starts and stops it; None if there is none."""

    is_held_by_kueue: bool = False
    """True if it was Kueue that suspended it last, which it also does with those that name no queue."""

    ttl: int | None = None
    """`ttlSecondsAfterFinished`."""

    is_over: bool = False
    """True if its controller has declared it completed or failed: it then makes no Job any more."""

    body: Json = field(default_factory=dict)
    """The object itself, as patches need it."""

    @classmethod
    def parse(cls, body: Json) -> Self:
        """Reads a JobSet as the API server returns it."""
        metadata, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
        suspended = bool(spec.get("suspend"))

        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            owner_uid=controller_uid(metadata),
            deleting="deletionTimestamp" in metadata,
            suspended=suspended,
            queue=(metadata.get("labels") or {}).get(QUEUE_LABEL) or None,
            is_held_by_kueue=suspended and is_suspended_by(metadata, "kueue"),
            ttl=spec.get("ttlSecondsAfterFinished"),
            is_over=any(true_condition(status, kind) for kind in ("Completed", "Failed")),
            body=body,
        )


async def find_problem(reader: JobSetReader, has_rights: bool) -> str | None:
    """Finds why no JobSet can be made; None if nothing is in the way."""
    if not has_rights:
        return "the operator has no rights on JobSets: the administrator sets the chart's value jobSets.enabled to true"
    if not await reader.are_served():
        return f"this cluster does not serve {API_VERSION}: the administrator installs JobSet (jobset.sigs.k8s.io)"
    return None


async def read_job_set(reader: JobSetReader, namespace: str, name: str) -> JobSet | None:
    """Reads a JobSet; None if it does not exist."""
    body = await reader.get(namespace, name)
    return JobSet.parse(body) if body else None


async def read_job_sets(reader: JobSetReader, namespace: str, jobs: Iterable[Json]) -> list[JobSet]:
    """Reads the JobSets that control some of the batch/v1 Jobs."""
    names = {name for job in jobs if (name := controlling_job_set(job["metadata"])) is not None}
    found = [await read_job_set(reader, namespace, name) for name in sorted(names)]
    return [job_set for job_set in found if job_set is not None]


def take_from_set(job: ChildJob, job_set: JobSet | None, set_name: str, known_seconds: int, now: datetime) -> ChildJob:
    """Returns the Job with what its JobSet says for it. `known_seconds`: those that the FineTuneJob has run, by its
    status; a Job that JobSet's controller made again knows only those of the day on which its JobSet was made."""
    if job_set is None or job.owner_uid != job_set.uid:
        # The garbage collector deletes what a JobSet has left behind.
        is_left_behind = controlling_job_set(job.body["metadata"]) == set_name
        return replace(job, deleting=True) if is_left_behind else job

    seconds = job.active_seconds
    if job.noted_start is None:
        running = int((now - job.started).total_seconds()) if job.started else 0
        seconds = max(seconds, known_seconds - running)
    return replace(
        job,
        queue=job_set.queue,
        queued_uid=job_set.uid,
        is_held_by_kueue=job_set.is_held_by_kueue,
        active_seconds=seconds,
    )


def find_foreign(uid: str, job: ChildJob | None, job_set: JobSet | None) -> str | None:
    """Finds which of a run's objects does not belong to the FineTuneJob with this UID; returns its kind and name.

    A Job belongs to what controls it, or to what controls its JobSet: the one that has the UID of the Job's controller.
    One that is being deleted is waited for, whoever made it.
    """
    if job_set is not None and job_set.owner_uid != uid:
        return f"JobSet {job_set.name}"
    if job is None or job.deleting:
        return None

    is_in_set = job_set is not None and job_set.uid == job.owner_uid
    return None if is_in_set or job.owner_uid == uid else f"Job {job.name}"
