"""Reads the queue of a job's current run, when it says something that the Job does not."""

from finetune_api.spec.spec import FineTuneJobSpec
from finetune_operator.cluster.queues import Queues
from finetune_operator.desired.installation import Installation
from finetune_operator.observe.snapshot import AnySnapshot
from finetune_operator.observe.workload import QueueView, find_workload

_NOT_INSTALLED = "Kueue is not installed in this cluster, or in a version that is not known: the API group is missing"


async def read_queue(
    queues: Queues, seen: AnySnapshot, spec: FineTuneJobSpec | str, installation: Installation
) -> QueueView | None:
    """Returns the queue that holds the current run's Job, or would hold a Job that is created now; None if there is no
    queue, or if the run is on its way."""
    if isinstance(spec, str):
        return None
    run, namespace = seen.current_run, seen.metadata.namespace
    name = run.job.queue if run.job is not None else spec.scheduling.queue_name
    is_over = seen.status.phase is not None and seen.status.phase.is_terminal
    if name is None or (run.job is None and is_over):
        return None

    pod = run.newest_pod
    is_underway = run.job is not None and not run.job.suspended and pod is not None and not pod.is_finished
    if run.job is not None and (run.job.is_over or (is_underway and not spec.run_policy.suspend)):
        return None

    if not await queues.are_served():
        return QueueView(name, installation.kueue, problem=_NOT_INSTALLED)
    if not installation.kueue:
        return QueueView(name, is_visible=False)
    if not is_over and not await queues.has_local_queue(namespace, name):
        problem = (
            f"namespace {namespace} has no LocalQueue {name}: create it, or create the job with the name of another"
        )
        return QueueView(name, problem=problem)
    if run.job is None:
        return QueueView(name)

    workload = find_workload(await queues.list_workloads(namespace, run.job.queued_uid), run.job.queued_uid)
    waits = workload is not None and workload.is_active and workload.holds("QuotaReserved") is None
    position = await queues.find_position(namespace, name, workload.name) if workload and waits else None
    return QueueView(name, workload=workload, position=position)
