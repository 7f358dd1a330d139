"""Explains why a run has no running trainer yet, in terms of what a person can do about it (pure)."""

from finetune_api.failures import FailureReason
from finetune_operator.decide.explain_failure import ends_the_run, explain_pod, is_interruption
from finetune_operator.decide.waiting.gpu_limit import find_gpu_wait
from finetune_operator.decide.waiting.queue import describe_pods_ready, explain_queue, explain_required_queue
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.snapshot import ChildRun, Snapshot, Waiting
from finetune_operator.status_reasons import StatusReason

# Reasons of the kubelet for a container that waits.
_PULL_ERRORS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_CONFIG_ERRORS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError")


def find_waiting(snapshot: Snapshot, run: ChildRun) -> Waiting | None:
    """Finds why an open run waits; None if its pod runs, if the job is suspended, and if it is about to end."""
    pod = run.awaited_pod
    if snapshot.spec.run_policy.suspend or (pod is not None and pod.is_running):
        return None
    held = _held(snapshot, run)
    if pod is None or not pod.is_finished:
        return held or describe_pods_ready(snapshot, _of_node(run, explain_waiting(pod, snapshot.blocker)))

    # The newest pod has ended. What keeps the next one from being made says more than the end of this one.
    if ends_the_run(snapshot, run):
        return None
    if held is not None:
        return held
    if is_interruption(pod) or snapshot.blocker is not None:
        return explain_waiting(None, snapshot.blocker)
    reason, message = explain_pod(snapshot, run, pod)
    return Waiting(StatusReason.RETRYING, f"{reason}: {message}; another pod will follow")


def _of_node(run: ChildRun, waiting: Waiting) -> Waiting:
    """Adds to the wait of a run on several nodes how many of its pods wait for the one that it is about."""
    nodes = run.job.nodes if run.job else 1
    running = sum(pod.is_running for pod in (run.newest_pod, *run.others) if pod is not None)
    if nodes == 1:
        return waiting
    message = f"{waiting.message}; training begins when all {nodes} pods run, and {running} do"
    return Waiting(waiting.reason, message, waiting.is_stalled)


def _held(snapshot: Snapshot, run: ChildRun) -> Waiting | None:
    """Explains why Kueue, or the namespace's limit, holds a run's Job; None if none does."""
    job = run.job
    if job is None:
        return None
    if job.suspended and (waiting := find_gpu_wait(snapshot, run)) is not None:
        return waiting
    if job.waits_in_queue:
        return explain_queue(snapshot, job)
    return explain_required_queue(job, run.component) if job.is_held_by_kueue else None


def explain_waiting(pod: TrainerPod | None, blocker: Waiting | None) -> Waiting:
    """Explains why a run waits. `pod`: its newest one that has not ended; `blocker`: what only Events show."""
    if blocker is not None:
        return blocker
    if pod is None:
        return Waiting(StatusReason.WAITING_FOR_POD, "waiting for a pod")

    # The kubelet retries these for ever, so a person has to mend the image or the configuration.
    detail = pod.waiting_message or pod.waiting_reason
    if pod.waiting_reason in _PULL_ERRORS:
        return Waiting(
            FailureReason.IMAGE_PULL_FAILED, f"the trainer image cannot be pulled: {detail}", is_stalled=True
        )
    if pod.waiting_reason in _CONFIG_ERRORS:
        return Waiting(FailureReason.CONTAINER_CONFIG_ERROR, f"the trainer cannot start: {detail}", is_stalled=True)

    # A node may become free, or an autoscaler may add one: this needs no person yet.
    if pod.unschedulable is not None:
        return Waiting(FailureReason.UNSCHEDULABLE, f"no node fits the pod: {pod.unschedulable}")
    return Waiting(StatusReason.POD_STARTING, f"pod {pod.name} is starting")
