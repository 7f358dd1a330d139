"""Leftovers that still run under a job's name although no Job of it says so: a new trainer has to wait for them (pure).

Somebody may delete a Job and keep its pods, or delete a FineTuneJob and create it again while the pods of the first one
still write their checkpoint. A label proves nothing, since anybody may put it on a pod. A pod counts if the status
knows it as an attempt, or if the Job that controls it has the name that a child of its UID must have.
"""

from collections.abc import Iterable

from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_api.status import Attempt
from finetune_api.vocabulary import JOB_UID_LABEL
from finetune_operator.desired.names import child_name, job_set_job_name, preflight_name
from finetune_operator.observe.children import ChildJob, TrainerPod
from finetune_operator.observe.job_set import JobSet
from finetune_operator.observe.snapshot import Predecessor


def find_orphaned_pods(
    metadata: ObjectMeta, attempts: Iterable[Attempt], pods: Iterable[TrainerPod]
) -> tuple[TrainerPod, ...]:
    """Finds the pods of a job that still run after their Job was deleted. `pods`: those that carry the job's UID and
    belong to none of its Jobs."""
    known, names = {attempt.uid for attempt in attempts}, _job_names(metadata)
    return tuple(pod for pod in pods if not pod.is_finished and (pod.uid in known or pod.owner_name in names))


def find_predecessor(
    metadata: ObjectMeta, jobs: Iterable[Json], pods: Iterable[Json], job_sets: Iterable[JobSet] = ()
) -> Predecessor | None:
    """Finds a deleted FineTuneJob of the same name of which something still runs. `jobs` and `pods`: all that carry the
    name; `job_sets`: those that control some of the Jobs."""
    former = [job for job in map(ChildJob.parse, jobs) if job.name in _names_of_predecessor(metadata, job.body)]
    # The garbage collector takes the owner away from what it is told to keep.
    kept = {job.name: f"job {job.name}" for job in former if job.owner_uid is None and not job.deleting}
    kept_sets = {each.uid: each for each in job_sets if each.owner_uid is None and not each.deleting}
    kept |= {job.name: f"jobset {kept_sets[job.owner_uid].name}" for job in former if job.owner_uid in kept_sets}

    for body in pods:
        pod = TrainerPod.parse(body)
        if not pod.is_finished and pod.owner_name in _names_of_predecessor(metadata, body):
            return Predecessor(pod.owner_name, pod.name, kept.get(pod.owner_name))

    # A Job between two attempts has no pod, and will have one.
    open_job = next((job for job in former if not (job.is_over or job.suspended)), None)
    return Predecessor(open_job.name, None, kept.get(open_job.name)) if open_job else None


def _names_of_predecessor(metadata: ObjectMeta, body: Json) -> tuple[str, ...]:
    """Names that the Jobs of a FineTuneJob with this name and the object's UID label have; none for our own UID."""
    uid = (body["metadata"].get("labels") or {}).get(JOB_UID_LABEL, "")
    if uid in ("", metadata.uid):
        return ()
    former = metadata.model_copy(update={"uid": uid})
    return _job_names(former)


def _job_names(metadata: ObjectMeta) -> tuple[str, ...]:
    return (child_name(metadata), job_set_job_name(metadata), preflight_name(metadata))
