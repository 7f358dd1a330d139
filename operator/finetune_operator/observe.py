"""Reads everything that the decision about one job needs: live, never from a cache.

One exception: a pod that is stopped by suspension or deletion vanishes as soon as it has ended, often before it can be
read. Its last words are kept from the watch (`LastWords`), because they hold the newest checkpoint.
"""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.failures import FailureReason
from finetune_api.job import FineTuneJob, ObjectMeta
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import Phase
from finetune_operator.children import ChildJob, Json, TrainerPod
from finetune_operator.cluster import Cluster, Key
from finetune_operator.desired.names import JOB_UID_LABEL, child_name, controller_uid
from finetune_operator.report_store import ReceivedReport, ReportStore
from finetune_operator.waiting import Waiting

LAST_WORDS_KEPT = 1000


class LastWords:
    """The newest pods that were seen ended, by UID; bounded."""

    def __init__(self) -> None:
        self._pods: OrderedDict[str, tuple[str, TrainerPod]] = OrderedDict()

    def note(self, body: Json) -> None:
        """Look at a pod from the watch."""
        pod = TrainerPod.parse(body)
        if pod.termination is None:
            return
        self._pods[pod.uid] = ((body["metadata"].get("labels") or {}).get(JOB_UID_LABEL, ""), pod)
        self._pods.move_to_end(pod.uid)
        if len(self._pods) > LAST_WORDS_KEPT:
            self._pods.popitem(last=False)

    def of(self, job_uid: str) -> list[TrainerPod]:
        """Ended pods of one FineTuneJob."""
        return [pod for uid, pod in self._pods.values() if uid == job_uid]


@dataclass(frozen=True)
class Observed:
    """One job and its children at one moment. Pure functions decide on nothing else."""

    metadata: ObjectMeta
    spec: FineTuneJobSpec | None
    """None where this version cannot read it; `spec_error` says why."""

    spec_error: str
    status: FineTuneJobStatus
    """What the operator wrote last."""

    config_map: Json | None
    child: ChildJob | None
    pods: tuple[TrainerPod, ...]
    """Pods of the child Job, oldest first; those that have vanished are included as long as they are remembered."""

    obstacle: Waiting | None
    """What keeps the newest pod from existing or starting, where only events tell."""

    report: ReceivedReport | None
    """Newest progress report of the newest pod."""

    now: datetime

    @property
    def newest_pod(self) -> TrainerPod | None:
        """The pod that speaks for the job."""
        return self.pods[-1] if self.pods else None

    @property
    def foreign_child(self) -> str | None:
        """Kind and name of an object that has our child's name but belongs to someone else."""
        if self.child is not None and self.child.owner_uid != self.metadata.uid:
            return f"Job {self.child.name}"
        if self.config_map is not None and controller_uid(self.config_map["metadata"]) != self.metadata.uid:
            return f"ConfigMap {self.config_map['metadata']['name']}"
        return None


async def observe(
    cluster: Cluster, key: Key, last_words: LastWords, reports: ReportStore, now: datetime
) -> Observed | None:
    """Read a job and its children; None where the job does not exist."""
    body = await cluster.get_fine_tune_job(key)
    if body is None:
        return None
    metadata = ObjectMeta.model_validate(body["metadata"])
    status = read_status(body.get("status") or {})
    spec, error = _read_spec(body)
    name = child_name(metadata)
    job = await cluster.get_job(key.namespace, name)
    child = ChildJob.parse(job) if job else None
    is_over = status.phase is not None and status.phase.is_terminal
    config_map = None if is_over else await cluster.get_config_map(key.namespace, name)
    pods = () if is_over or child is None else await _pods(cluster, key, metadata.uid, child, last_words)
    obstacle = await _obstacle(cluster, key, child, pods) if child and not is_over else None
    report = reports.newest(metadata.uid)
    if report and pods and report.pod_uid != pods[-1].uid:
        report = None
    return Observed(metadata, spec, error, status, config_map, child, pods, obstacle, report, now)


def read_status(raw: Json) -> FineTuneJobStatus:
    """Our own last status. One that another version of the operator wrote may hold fields we do not know: then only
    what must never be forgotten is taken, and the rest is derived again."""
    try:
        return FineTuneJobStatus.model_validate(raw)
    except ValidationError:
        phase = raw.get("phase")
        known = Phase(phase) if phase in tuple(Phase) else None
        seconds = raw.get("activeSeconds")
        return FineTuneJobStatus(phase=known, active_seconds=seconds if isinstance(seconds, int) else None)


def _read_spec(body: dict[str, Any]) -> tuple[FineTuneJobSpec | None, str]:
    try:
        return FineTuneJob.from_object(body | {"status": {}}).spec, ""
    except ValidationError as error:
        return None, "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


async def _pods(
    cluster: Cluster, key: Key, job_uid: str, child: ChildJob, last_words: LastWords
) -> tuple[TrainerPod, ...]:
    live = [TrainerPod.parse(body) for body in await cluster.list_pods(key.namespace, job_uid)]
    seen = {pod.uid: pod for pod in [*last_words.of(job_uid), *live] if pod.owner_uid == child.uid}
    return tuple(sorted(seen.values(), key=lambda pod: (pod.created, pod.name)))


async def _obstacle(cluster: Cluster, key: Key, child: ChildJob, pods: tuple[TrainerPod, ...]) -> Waiting | None:
    """The two hindrances that neither Job nor pod shows: the pod is not admitted, or its volumes cannot be mounted."""
    if child.suspended or child.complete or child.failed:
        return None
    if not pods:
        said = _newest_message(await cluster.list_events(key.namespace, child.uid, "FailedCreate"))
        return Waiting(FailureReason.POD_REJECTED, f"the pod is refused: {said}", is_stalled=True) if said else None
    if pods[-1].waiting_reason != "ContainerCreating":
        return None
    said = _newest_message(await cluster.list_events(key.namespace, pods[-1].uid, "FailedMount"))
    return Waiting(FailureReason.CONTAINER_CONFIG_ERROR, f"the trainer cannot start: {said}", True) if said else None


def _newest_message(events: list[Json]) -> str | None:
    if not events:
        return None
    newest = max(events, key=lambda event: event.get("lastTimestamp") or event["metadata"]["creationTimestamp"])
    return str(newest.get("message", ""))
