"""Reads who holds the GPUs of a namespace and who waits for them, only where the administrator has set a limit.

Truth about use are the trainers' batch/v1 Jobs, which exist from the moment in which GPUs are asked for, whatever the
operator had time to write. The line of those that wait is the order in which their FineTuneJobs were created. So
nothing has to be remembered over a restart of the operator.
"""

from collections.abc import Iterable
from typing import Protocol

from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.vocabulary import JOB_NAME_LABEL, Phase, PreflightMode
from finetune_operator.cluster.gpu_users import GpuUsers
from finetune_operator.desired.installation import Installation
from finetune_operator.desired.names import controller_uid
from finetune_operator.observe.children import ChildJob
from finetune_operator.observe.job_set import JobSet, JobSetReader, read_job_sets
from finetune_operator.observe.snapshot import AnySnapshot, GpuUse, GpuUser, awaits_preflight
from finetune_operator.status_reasons import StatusReason

_NO_GPUS = ("cpu", "memory", "ephemeral-storage")
_WAITS = (StatusReason.GPU_LIMIT_REACHED, StatusReason.PREFLIGHT_PASSED)


class GpuCluster(Protocol):
    """Requests to Kubernetes about GPUs, as `Cluster` offers them."""

    @property
    def gpu_users(self) -> GpuUsers: ...

    @property
    def job_sets(self) -> JobSetReader: ...


async def read_gpu_use(
    cluster: GpuCluster, seen: AnySnapshot, spec: FineTuneJobSpec | str, installation: Installation
) -> GpuUse | None:
    """Returns how the GPUs of the namespace are used, for a job that would take some of them now; None for any other,
    and without a limit."""
    limit = installation.max_gpus_per_namespace
    if limit is None or isinstance(spec, str) or not _wants_to_start(seen, spec):
        return None

    # Jobs come last: one that was made between the two lists is seen.
    namespace = seen.metadata.namespace
    fine_tune_jobs = await cluster.gpu_users.list_fine_tune_jobs(namespace)
    trainer_jobs = await cluster.gpu_users.list_trainer_jobs(namespace)
    job_sets = await read_job_sets(cluster.job_sets, namespace, trainer_jobs) if installation.job_sets else []
    return find_gpu_use(seen.metadata, limit, fine_tune_jobs, trainer_jobs, job_sets)


def find_gpu_use(
    job: ObjectMeta,
    limit: int,
    fine_tune_jobs: list[Json],
    trainer_jobs: list[Json],
    job_sets: Iterable[JobSet] = (),
) -> GpuUse:
    """Finds who holds GPUs and who comes first, from both lists of the job's namespace. `job_sets`: those that control
    some of the Jobs."""
    sets: dict[str | None, JobSet] = {job_set.uid: job_set for job_set in job_sets}
    succeeded = {each["metadata"]["uid"] for each in fine_tune_jobs if _phase(each) == Phase.SUCCEEDED}
    holders: dict[str, GpuUser] = {}
    for body in trainer_jobs:
        controller = controller_uid(body["metadata"])
        job_set = sets.get(controller)
        owner = (job_set.owner_uid if job_set else controller) or str(body["metadata"]["uid"])
        if owner not in succeeded and owner != job.uid and holds_gpus(ChildJob.parse(body), job_set):
            labels = body["metadata"].get("labels") or {}
            holders[owner] = GpuUser(str(labels.get(JOB_NAME_LABEL, body["metadata"]["name"])), _gpus_of(body))

    ahead = [
        GpuUser(str(each["metadata"]["name"]), _wanted_gpus(each))
        for each in sorted(fine_tune_jobs, key=_order)
        if each["metadata"]["uid"] not in holders and _is_before(each, job) and _waits(each, limit)
    ]
    using = tuple(sorted((user for user in holders.values() if user.gpus), key=lambda user: user.name))
    return GpuUse(limit, using, tuple(ahead))


def holds_gpus(job: ChildJob, job_set: JobSet | None) -> bool:
    """True if a trainer's Job has pods, or gets them: also one that is suspended whose pod still writes its
    checkpoint, or that its JobSet is about to resume."""
    if job.is_over:
        return False
    if job_set is not None and not (job_set.suspended or job_set.is_over):
        return True
    status = job.body.get("status") or {}
    return not job.suspended or bool(status.get("active") or status.get("terminating"))


def _wants_to_start(seen: AnySnapshot, spec: FineTuneJobSpec) -> bool:
    if spec.resources.gpus == 0 or spec.run_policy.suspend or spec.scheduling.queue_name is not None:
        return False
    if seen.metadata.deletion_timestamp is not None or (seen.status.phase and seen.status.phase.is_terminal):
        return False
    job = seen.training.job
    return job.suspended and not job.is_over if job else not awaits_preflight(spec, seen.status)


def _waits(body: Json, limit: int) -> bool:
    """True if a job waits for GPUs and for nothing else. One that waits for a person, or for anything but GPUs, keeps
    nobody back."""
    spec, status = body["spec"], body.get("status") or {}
    policy = spec.get("runPolicy") or {}
    if policy.get("suspend") or "deletionTimestamp" in body["metadata"] or not 0 < _wanted_gpus(body) <= limit:
        return False
    if (spec.get("scheduling") or {}).get("queueName"):
        return False

    # A job without checks that nobody has looked at yet is in the line, too.
    is_new = not status.get("phase") and policy.get("preflight") == PreflightMode.SKIP
    return is_new or status.get("reason") in _WAITS


def _is_before(body: Json, job: ObjectMeta) -> bool:
    return _order(body) < (job.creation_timestamp or "", job.name)


def _order(body: Json) -> tuple[str, str]:
    """Order of creation; of jobs of one second, the order of their names."""
    return str(body["metadata"].get("creationTimestamp") or ""), str(body["metadata"]["name"])


def _phase(body: Json) -> str | None:
    return (body.get("status") or {}).get("phase")


def _wanted_gpus(body: Json) -> int:
    resources = body["spec"].get("resources") or {}
    return int(resources.get("gpus", 1)) * int(resources.get("nodes", 1))


def _gpus_of(job: Json) -> int:
    """GPUs of a Job's pods: whatever they ask for that is no processor, memory or disk."""
    containers = job["spec"]["template"]["spec"].get("containers") or ()
    limits = [(container.get("resources") or {}).get("limits") or {} for container in containers]
    gpus = sum(int(amount) for each in limits for name, amount in each.items() if name not in _NO_GPUS)
    return gpus * int(job["spec"].get("parallelism", 1))
