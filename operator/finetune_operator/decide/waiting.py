"""Why the trainer does not run yet, in terms of what a person can do about it (pure)."""

from finetune_api.failures import FailureReason
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.snapshot import Waiting
from finetune_operator.reasons import Reason

_PULL_ERRORS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_CONFIG_ERRORS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError")


def explain_waiting(pod: TrainerPod | None, blocker: Waiting | None) -> Waiting:
    """Why a job whose trainer does not run waits. `blocker` is what only events tell."""
    if blocker is not None:
        return blocker
    if pod is None:
        return Waiting(Reason.WAITING_FOR_POD, "waiting for a pod")
    said = pod.waiting_message or pod.waiting_reason
    if pod.waiting_reason in _PULL_ERRORS:
        return Waiting(FailureReason.IMAGE_PULL_FAILED, f"the trainer image cannot be pulled: {said}", is_stalled=True)
    if pod.waiting_reason in _CONFIG_ERRORS:
        return Waiting(FailureReason.CONTAINER_CONFIG_ERROR, f"the trainer cannot start: {said}", is_stalled=True)
    if pod.unschedulable is not None:
        return Waiting(Reason.UNSCHEDULABLE, f"no node fits: {pod.unschedulable}")
    return Waiting(Reason.POD_STARTING, f"pod {pod.name} is starting")
