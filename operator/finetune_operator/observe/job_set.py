"""The JobSet between a FineTuneJob and the trainer's Job, and whose both are (pure).

Only UIDs say so. Two JobSets may have had one name, and anybody may write a label.
"""

from dataclasses import dataclass
from typing import Self

from finetune_api.base import Json
from finetune_operator.desired.names import controller_uid
from finetune_operator.observe.children import ChildJob


@dataclass(frozen=True)
class JobSet:
    """A JobSet, as far as it says whose a Job is."""

    name: str
    uid: str
    owner_uid: str | None
    """UID of the object that controls it; None if no object does, as after a deletion with `--cascade=orphan`."""

    deleting: bool

    @classmethod
    def parse(cls, body: Json) -> Self:
        """Reads a JobSet as the API server returns it."""
        metadata = body["metadata"]
        return cls(metadata["name"], metadata["uid"], controller_uid(metadata), "deletionTimestamp" in metadata)


def find_foreign(uid: str, job: ChildJob | None, job_set: JobSet | None) -> str | None:
    """Finds which of a run's objects does not belong to the FineTuneJob with this UID; returns its kind and name.

    A Job belongs to what controls it, or to what controls its JobSet: the one that has the UID of the Job's controller.
    """
    if job_set is not None and job_set.owner_uid != uid:
        return f"JobSet {job_set.name}"
    if job is None:
        return None

    is_in_set = job_set is not None and job_set.uid == job.owner_uid
    return None if is_in_set or job.owner_uid == uid else f"Job {job.name}"
