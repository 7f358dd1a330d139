"""Terminated pods as the watch has seen them: suspension and deletion remove a pod before a reconcile can read it."""

from collections import OrderedDict

from finetune_api.base import Json
from finetune_operator.desired.names import JOB_UID_LABEL
from finetune_operator.observe.children import TrainerPod

MAX_TERMINATED_PODS = 1000  # a pod is needed only until its job is looked at, a moment later


class TerminatedPods:
    """The newest terminated pods by UID, at most `MAX_TERMINATED_PODS` of them."""

    def __init__(self) -> None:
        self._pods: OrderedDict[str, tuple[str, TrainerPod]] = OrderedDict()

    def note(self, body: Json) -> None:
        """Keeps a pod from the watch if its trainer has ended."""
        pod = TrainerPod.parse(body)
        if pod.termination is None:
            return

        # Newest last, so that the oldest is dropped first.
        self._pods[pod.uid] = ((body["metadata"].get("labels") or {}).get(JOB_UID_LABEL, ""), pod)
        self._pods.move_to_end(pod.uid)
        if len(self._pods) > MAX_TERMINATED_PODS:
            self._pods.popitem(last=False)

    def of(self, job_uid: str) -> list[TrainerPod]:
        """Returns the terminated pods of one FineTuneJob."""
        return [pod for uid, pod in self._pods.values() if uid == job_uid]
