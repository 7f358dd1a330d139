"""A job's child Jobs and pods as small typed values, parsed once.

Watch events carry whole pods. Keeping those of thousands of jobs would take more memory than everything else.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from finetune_api.base import MAX_SECONDS, Json
from finetune_api.vocabulary import QUEUE_LABEL, TRAINER_CONTAINER
from finetune_operator.desired.names import (
    ACTIVE_SECONDS_ANNOTATION,
    ACTIVE_SINCE_ANNOTATION,
    controller_uid,
    controlling_job,
)
from finetune_operator.desired.trainer_pod import CONFIG_VOLUME
from finetune_operator.observe.termination import Termination, parse_time

EVICTED = "Evicted"
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True)
class TrueCondition:
    """A condition of an object whose status is True."""

    reason: str
    message: str
    time: datetime | None


@dataclass(frozen=True)
class ChildJob:
    """One of a job's two batch/v1 Jobs: the trainer's or that of preflight."""

    name: str
    uid: str
    owner_uid: str | None
    deleting: bool
    suspended: bool
    queue: str | None
    """Kueue's LocalQueue, which alone starts and stops the Job; None if there is none."""

    queued_uid: str
    """UID of the object that waits in the queue: the Job itself, or the JobSet that makes it."""

    deadline: int | None
    """`activeDeadlineSeconds`: counted from `started`."""

    ttl: int | None
    """`ttlSecondsAfterFinished`."""

    created: datetime | None
    started: datetime | None
    """Time of the last start or resumption; None while the Job is suspended."""

    active_seconds: int
    """Seconds that the Job ran before `started`, as its annotation says."""

    noted_start: datetime | None
    """Time of the last start of a Job in a queue, as its annotation says: a queue suspends it without a note."""

    is_held_by_kueue: bool
    """True if it was Kueue that suspended the Job last, which it also does with Jobs that name no queue."""

    nodes: int
    """Pods that run together."""

    complete: TrueCondition | None
    failed: TrueCondition | None
    suspension: TrueCondition | None
    """Since when the Job is suspended."""

    body: Json
    """The object itself, as patches need it."""

    @classmethod
    def parse(cls, body: Json) -> Self:
        """Reads a Job as the API server returns it."""
        metadata, spec, status = body["metadata"], body["spec"], body.get("status") or {}

        # The annotation is ours, but anybody may have edited it.
        annotations = metadata.get("annotations") or {}
        recorded = annotations.get(ACTIVE_SECONDS_ANNOTATION, "0")

        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            owner_uid=controller_uid(metadata),
            deleting="deletionTimestamp" in metadata,
            suspended=bool(spec.get("suspend")),
            queue=(metadata.get("labels") or {}).get(QUEUE_LABEL) or None,
            queued_uid=metadata["uid"],
            deadline=spec.get("activeDeadlineSeconds"),
            ttl=spec.get("ttlSecondsAfterFinished"),
            created=parse_time(metadata.get("creationTimestamp")),
            started=parse_time(status.get("startTime")),
            active_seconds=min(int(recorded), MAX_SECONDS) if re.fullmatch("[0-9]{1,10}", recorded) else 0,
            noted_start=_noted_time(annotations.get(ACTIVE_SINCE_ANNOTATION)),
            is_held_by_kueue=bool(spec.get("suspend")) and is_suspended_by(metadata, "kueue"),
            nodes=int(spec.get("completions") or 1),
            complete=true_condition(status, "Complete"),
            failed=true_condition(status, "Failed"),
            suspension=true_condition(status, "Suspended"),
            body=body,
        )

    @property
    def config_map_name(self) -> str | None:
        """Name of the ConfigMap that the Job's pods mount; None if they mount none."""
        volumes = self.body["spec"]["template"]["spec"].get("volumes") or ()
        sources = (volume.get("configMap") for volume in volumes if volume["name"] == CONFIG_VOLUME)
        return next((str(source["name"]) for source in sources if source), None)

    @property
    def waits_in_queue(self) -> bool:
        """True while Kueue holds the Job: it was not admitted yet, or was evicted."""
        return self.queue is not None and self.suspended

    @property
    def is_over(self) -> bool:
        """True if the Job controller has declared the Job complete or failed."""
        return self.complete is not None or self.failed is not None

    def is_past_deadline(self, now: datetime) -> bool:
        """True if the Job controller ends the Job by its deadline, or has: it says so only when the pods are gone."""
        if self.deadline is None or self.started is None:
            return False
        return (now - self.started).total_seconds() >= self.deadline

    def active_seconds_at(self, now: datetime) -> int:
        """Seconds that the Job has run until `now`, without the time it was suspended."""
        # A Job that has ended stopped running then, whenever it is looked at.
        end = self.complete or self.failed
        until = end.time if end and end.time else now
        started = self.started

        # A queue has suspended it, and the Job controller has forgotten the start.
        if started is None and self.suspended and self.noted_start is not None:
            started, until = self.noted_start, (self.suspension and self.suspension.time) or now

        return self.active_seconds + (max(0, int((until - started).total_seconds())) if started else 0)


@dataclass(frozen=True)
class TrainerPod:
    """A pod of one of the two Jobs."""

    name: str
    uid: str
    owner_uid: str | None
    owner_name: str | None
    """Name of the Job that made the pod, as the pod says; None if somebody else made it, or if its Job was deleted with
    `--cascade=orphan`."""

    created: str
    """Creation time as Kubernetes writes it; sorts as text."""

    phase: str
    deleting: bool
    reason: str
    """Reason for which the kubelet ended or refused the pod, such as Evicted."""

    message: str
    unschedulable: str | None
    """The scheduler's message while it finds no node for the pod."""

    is_disrupted: bool
    """True if the cluster removed the pod: eviction, preemption, or a lost node."""

    waiting_reason: str
    """Reason for which the kubelet does not start the container yet, such as ErrImagePull."""

    waiting_message: str
    scheduled: datetime | None
    """Time at which the pod got a node."""

    started: datetime | None
    termination: Termination | None
    index: int = 0
    """Completion index, of a Job on several nodes; the pod of index 0 leads."""

    ended_by: str = ""
    """The other pod of its attempt whose end this is; empty if it is the pod's own."""

    @property
    def is_finished(self) -> bool:
        """True if the trainer's process has ended for good."""
        return self.phase in ("Succeeded", "Failed") or self.termination is not None

    @property
    def is_running(self) -> bool:
        """True while the trainer's process runs."""
        return self.started is not None and not self.is_finished

    @classmethod
    def parse(cls, body: Json) -> Self:
        """Reads a pod as the API server returns it."""
        metadata, status = body["metadata"], body.get("status") or {}

        state = _container_state(status)
        waiting, running = state.get("waiting") or {}, state.get("running") or {}
        termination = Termination.parse(state["terminated"]) if state.get("terminated") else None

        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            owner_uid=controller_uid(metadata),
            owner_name=controlling_job(metadata),
            created=metadata.get("creationTimestamp") or "",
            phase=status.get("phase", "Pending"),
            deleting="deletionTimestamp" in metadata,
            reason=status.get("reason", ""),
            message=status.get("message", ""),
            unschedulable=_unschedulable(status),
            # The control plane marks disruptions by the condition, the kubelet its evictions by the reason.
            is_disrupted=true_condition(status, "DisruptionTarget") is not None or status.get("reason") == EVICTED,
            waiting_reason=waiting.get("reason", ""),
            waiting_message=waiting.get("message", ""),
            scheduled=bound.time if (bound := true_condition(status, "PodScheduled")) else None,
            # A container that has ended has its start time in the terminated state only.
            started=termination.started if termination else parse_time(running.get("startedAt")),
            termination=termination,
            index=_index(metadata),
        )


def _index(metadata: Json) -> int:
    text = str((metadata.get("annotations") or {}).get(INDEX_ANNOTATION, "0"))
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else 0


def _noted_time(text: str | None) -> datetime | None:
    """Reads a time that anybody may have edited."""
    try:
        time = parse_time(text)
    except ValueError:
        return None
    return time if time is not None and time.tzinfo is not None else None


def is_suspended_by(metadata: Json, manager: str) -> bool:
    """True if a field manager wrote `spec.suspend` last."""
    for entry in metadata.get("managedFields") or ():
        if entry.get("manager") == manager and "f:suspend" in (entry.get("fieldsV1") or {}).get("f:spec", {}):
            return True
    return False


def true_condition(status: Json, kind: str) -> TrueCondition | None:
    """Returns a condition of an object's status that is True."""
    for condition in status.get("conditions") or ():
        if condition["type"] == kind and condition["status"] == "True":
            time = parse_time(condition.get("lastTransitionTime"))
            return TrueCondition(condition.get("reason", ""), condition.get("message", ""), time)
    return None


def _container_state(status: Json) -> Json:
    # There is no container status before a node's kubelet has seen the pod.
    for container in status.get("containerStatuses") or ():
        if container["name"] == TRAINER_CONTAINER:
            return container.get("state") or {}
    return {}


def _unschedulable(status: Json) -> str | None:
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message") or condition.get("reason") or "not scheduled")
    return None
