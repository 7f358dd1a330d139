"""Terminated pods as the watch has seen them: suspension and deletion remove a pod before a reconcile can read it."""

from collections import OrderedDict

from finetune_api.base import Json
from finetune_api.vocabulary import JOB_UID_LABEL
from finetune_operator.observe.children import TrainerPod

MAX_TERMINATED_PODS = 1000  # a pod is needed only until its job is looked at, a moment later


class TerminatedPods:
    """The newest terminated pods by UID, at most `MAX_TERMINATED_PODS` of them."""

    def __init__(self) -> None:
        self._pods: OrderedDict[str, tuple[str, str, TrainerPod]] = OrderedDict()  # namespace, job's UID, pod

    def note(self, body: Json) -> None:
        """Keeps a pod from the watch if its trainer has ended."""
        pod = TrainerPod.parse(body)
        if pod.termination is None:
            return

        # Newest last, so that the oldest is dropped first.
        metadata = body["metadata"]
        self._pods[pod.uid] = (metadata["namespace"], (metadata.get("labels") or {}).get(JOB_UID_LABEL, ""), pod)
        self._pods.move_to_end(pod.uid)
        if len(self._pods) > MAX_TERMINATED_PODS:
            self._pods.popitem(last=False)

    def of(self, namespace: str, job_uid: str) -> list[TrainerPod]:
        """Returns the terminated pods of one FineTuneJob.

        Only pods of the job's own namespace count: whoever may create pods elsewhere can give one any label and any
        owner, and must not end this job with it.
        """
        return [pod for space, uid, pod in self._pods.values() if (space, uid) == (namespace, job_uid)]
