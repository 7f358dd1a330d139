"""Why a run waits: the most precise cause first, and whether a person has to act."""

import pytest

from finetune_operator.decide.waiting.explain_waiting import explain_waiting
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.snapshot import Waiting
from finetune_test_operator.snapshot_builder import a_pod


def _waiting(reason: str, message: str = "") -> TrainerPod:
    return a_pod(state={"waiting": {"reason": reason, "message": message}})


UNSCHEDULABLE = a_pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}])
REFUSED = Waiting("PodRejected", "the pod is refused: quota", is_stalled=True)

CASES: dict[str, tuple[TrainerPod | None, Waiting | None, Waiting]] = {
    "no pod": (None, None, Waiting("WaitingForPod", "waiting for a pod")),
    "an Event says more than a pod": (a_pod(), REFUSED, REFUSED),
    "an image": (
        _waiting("ImagePullBackOff", "not found"),
        None,
        Waiting("ImagePullFailed", "the trainer image cannot be pulled: not found", is_stalled=True),
    ),
    "an image, without a message": (
        _waiting("ErrImagePull"),
        None,
        Waiting("ImagePullFailed", "the trainer image cannot be pulled: ErrImagePull", is_stalled=True),
    ),
    "a Secret": (
        _waiting("CreateContainerConfigError", 'secret "s3" not found'),
        None,
        Waiting("ContainerConfigError", 'the trainer cannot start: secret "s3" not found', is_stalled=True),
    ),
    "no node": (UNSCHEDULABLE, None, Waiting("Unschedulable", "no node fits the pod: 0/3 nodes")),
    "a container that is being created": (
        _waiting("ContainerCreating"),
        None,
        Waiting("PodStarting", "pod bot-pod-1 is starting"),
    ),
}


@pytest.mark.parametrize(("pod", "blocker", "expected"), CASES.values(), ids=CASES)
def test_why_a_run_waits(pod: TrainerPod | None, blocker: Waiting | None, expected: Waiting) -> None:
    assert explain_waiting(pod, blocker) == expected
