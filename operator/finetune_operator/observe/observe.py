"""Reads everything that the decision about one job needs: live, never from a cache.

One exception: a pod that is stopped by suspension or deletion vanishes as soon as it has ended, often before it can be
read. Its last words are kept from the watch (`TerminatedPods`), because they hold the newest checkpoint.
"""

import re
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.base import Json
from finetune_api.failures import FailureReason
from finetune_api.job import FineTuneJob, ObjectMeta
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import Phase, PreflightResult
from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.desired.names import child_name, preflight_name
from finetune_operator.observe.children import ChildJob, TrainerPod
from finetune_operator.observe.report_store import ReceivedReport, ReportStore
from finetune_operator.observe.snapshot import Snapshot, Waiting, awaits_preflight
from finetune_operator.observe.terminated_pods import TerminatedPods


async def observe(
    cluster: Cluster, key: NamespacedName, terminated_pods: TerminatedPods, reports: ReportStore, now: datetime
) -> Snapshot | None:
    """Read a job and its children; None where the job does not exist."""
    body = await cluster.get_fine_tune_job(key)
    if body is None:
        return None
    metadata = ObjectMeta.model_validate(body["metadata"])
    status = read_status(body.get("status") or {})
    spec, error = _read_spec(body)
    is_over = status.phase is not None and status.phase.is_terminal
    child = await _job(cluster, key, child_name(metadata))
    preflight = None
    if _looks_at_preflight(spec, status, child):
        preflight = await _job(cluster, key, preflight_name(metadata))
    config_map = None if is_over else await cluster.get_config_map(key.namespace, child_name(metadata))
    listed = [] if is_over else await cluster.list_pods(key.namespace, metadata.uid)
    live = [TrainerPod.parse(pod) for pod in listed]
    seen = [*terminated_pods.of(metadata.uid), *live]
    pods, preflight_pods = _pods_of(child, seen), _pods_of(preflight, seen)
    orphaned_pods = tuple(pod for pod in live if not pod.is_finished and pod not in (*pods, *preflight_pods))
    blocker = None
    if not is_over:
        blocker = await _find_blocker(cluster, key, child or preflight, pods if child else preflight_pods)
    return Snapshot(
        metadata=metadata,
        spec=spec,
        spec_error=error,
        status=status,
        config_map=config_map,
        child=child,
        pods=pods,
        preflight=preflight,
        preflight_pods=preflight_pods,
        orphaned_pods=orphaned_pods,
        blocker=blocker,
        report=newest_report(reports, metadata.uid, pods),
        now=now,
    )


def newest_report(reports: ReportStore, job_uid: str, pods: tuple[TrainerPod, ...]) -> ReceivedReport | None:
    """The newest report of a job, unless a newer pod than the one that sent it is there."""
    report = reports.newest(job_uid)
    return None if report and pods and report.pod_uid != pods[-1].uid else report


def read_status(raw: Json) -> FineTuneJobStatus:
    """Our own last status. One that another version of the operator wrote may hold fields we do not know: then only
    what must never be forgotten is taken, and the rest is derived again."""
    try:
        return FineTuneJobStatus.model_validate(raw)
    except ValidationError:
        phase, seconds = raw.get("phase"), raw.get("activeSeconds")
        preflight = raw.get("preflight")
        result = preflight.get("result") if isinstance(preflight, dict) else None
        return FineTuneJobStatus(
            phase=Phase(phase) if phase in tuple(Phase) else None,
            active_seconds=seconds if isinstance(seconds, int) else None,
            preflight=PreflightStatus(result=result) if result in tuple(PreflightResult) else None,
        )


def _looks_at_preflight(spec: FineTuneJobSpec | None, status: FineTuneJobStatus, child: ChildJob | None) -> bool:
    """Whether the Job of preflight matters: it may be needed, or its pods are to be removed in the end."""
    if status.phase is None or not status.phase.is_terminal:
        return child is None and awaits_preflight(spec, status)
    return status.preflight is not None and spec is not None and spec.run_policy.ttl_seconds_after_finished is not None


async def _job(cluster: Cluster, key: NamespacedName, name: str) -> ChildJob | None:
    body = await cluster.get_job(key.namespace, name)
    return ChildJob.parse(body) if body else None


def _read_spec(body: dict[str, Any]) -> tuple[FineTuneJobSpec | None, str]:
    try:
        return FineTuneJob.from_object(body | {"status": {}}).spec, ""
    except ValidationError as error:
        return None, "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def _pods_of(child: ChildJob | None, candidates: list[TrainerPod]) -> tuple[TrainerPod, ...]:
    """Pods of a Job, oldest first; of two readings of one pod the later one counts."""
    seen = {pod.uid: pod for pod in candidates if child is not None and pod.owner_uid == child.uid}
    return tuple(sorted(seen.values(), key=lambda pod: (pod.created, pod.name)))


async def _find_blocker(
    cluster: Cluster, key: NamespacedName, child: ChildJob | None, pods: tuple[TrainerPod, ...]
) -> Waiting | None:
    """The two hindrances that neither Job nor pod shows: the pod is not admitted, or its volumes cannot be mounted."""
    if child is None or child.suspended or child.complete or child.failed:
        return None
    if not pods or pods[-1].is_finished:
        said = _newest_message(await cluster.list_events(key.namespace, child.uid, "FailedCreate"))
        if said is None:
            return None
        said = re.sub(rf"{child.name}-\w{{5}}\b", child.name, said)  # else each new try would be a new status
        return Waiting(FailureReason.POD_REJECTED, f"the pod is refused: {said}", is_stalled=True)
    if pods[-1].waiting_reason != "ContainerCreating":
        return None
    said = _newest_message(await cluster.list_events(key.namespace, pods[-1].uid, "FailedMount"))
    return Waiting(FailureReason.CONTAINER_CONFIG_ERROR, f"the trainer cannot start: {said}", True) if said else None


def _newest_message(events: list[Json]) -> str | None:
    if not events:
        return None
    newest = max(events, key=lambda event: event.get("lastTimestamp") or event["metadata"]["creationTimestamp"])
    return str(newest.get("message", ""))
