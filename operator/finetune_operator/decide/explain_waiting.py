"""Explains why a run has no running trainer yet, in terms of what a person can do about it (pure)."""

from finetune_api.failures import FailureReason
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.snapshot import Waiting
from finetune_operator.status_reasons import StatusReason

# Reasons of the kubelet for a container that waits.
_PULL_ERRORS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_CONFIG_ERRORS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError")


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
        return Waiting(StatusReason.UNSCHEDULABLE, f"no node fits the pod: {pod.unschedulable}")
    return Waiting(StatusReason.POD_STARTING, f"pod {pod.name} is starting")
