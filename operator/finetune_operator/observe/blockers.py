"""Reads what keeps a run's pod from starting, if neither its Job nor the pod shows it, but only Events."""

import re
from datetime import datetime

from finetune_api.base import Json
from finetune_api.failures import FailureReason
from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.observe.children import ChildJob, TrainerPod
from finetune_operator.observe.snapshot import ChildRun, Waiting


async def find_blocker(cluster: Cluster, key: NamespacedName, run: ChildRun) -> Waiting | None:
    """Finds what neither Job nor pod shows, but only Events: that the pod is refused, or that its volumes cannot be
    mounted."""
    if run.job is None or run.seconds_until_events(cluster.now()) != 0:
        return None

    # No pod, though the Job is to run: a quota or an admission policy may refuse it.
    pod = run.awaited_pod
    if pod is None or pod.is_finished:
        events = await cluster.list_events(key.namespace, run.job.uid, "FailedCreate")
        # Refusals before the newest pod, or before the Job was resumed, are over.
        events = [event for event in events if not _is_before(event, pod, run.job)]
        text = _newest_message(events)
        if text is None:
            return None

        # Each attempt has a new random suffix, which would make each a new status.
        text = re.sub(rf"{run.job.name}-\w{{5}}\b", run.job.name, text)
        return Waiting(FailureReason.POD_REJECTED, f"the pod is refused: {text}", is_stalled=True)

    # A pod that has a node, but no container yet: a Secret or a claim may be missing.
    failures = await cluster.list_events(key.namespace, pod.uid, "FailedMount")
    text = _newest_message(failures)
    if text is None:
        return None

    # The image is pulled once the volumes are mounted, so an older failure has passed.
    pulls = await cluster.list_events(key.namespace, pod.uid, "Pulling")
    if pulls and max(map(_time_of, pulls)) >= max(map(_time_of, failures)):
        return None

    return Waiting(FailureReason.CONTAINER_CONFIG_ERROR, f"the trainer cannot start: {text}", is_stalled=True)


def _is_before(event: Json, pod: TrainerPod | None, job: ChildJob) -> bool:
    """True if an event is older than the newest pod, or than the Job's start or resumption."""
    time = _time_of(event)
    if pod is not None and time <= pod.created:
        return True
    return job.started is not None and datetime.fromisoformat(time) < job.started


def _time_of(event: Json) -> str:
    """Returns the time of an event as Kubernetes writes it; sorts as text."""
    # Events of the newer events.k8s.io API have no lastTimestamp.
    return str(event.get("lastTimestamp") or event["metadata"]["creationTimestamp"])


def _newest_message(events: list[Json]) -> str | None:
    if not events:
        return None

    return str(max(events, key=_time_of).get("message", ""))
