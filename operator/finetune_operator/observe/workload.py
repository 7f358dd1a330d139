"""A run's queue, and the Workload that Kueue made of the run's Job, as small typed values (pure)."""

from dataclasses import dataclass, field
from typing import Final, Self

from finetune_api import GROUP
from finetune_api.base import Json
from finetune_operator.desired.names import controller_uid

DEACTIVATED_ANNOTATION: Final = f"{GROUP}/deactivated"
"""Stands on a Workload that this operator has deactivated: nobody else's deactivation is taken back."""

MAX_WORDS = 400
"""Characters of a message of Kueue that are passed on; it lists every flavor."""


@dataclass(frozen=True)
class WorkloadCondition:
    """A condition of a Workload, whatever its status."""

    is_true: bool
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}" if self.message else self.reason


@dataclass(frozen=True)
class Workload:
    """Kueue's Workload of a Job."""

    name: str
    is_active: bool
    """False: Kueue neither admits the Job nor lets it run."""

    is_deactivated_by_us: bool
    conditions: dict[str, WorkloadCondition] = field(default_factory=dict)
    """By type: QuotaReserved, Admitted, Evicted, Requeued, PodsReady, Finished."""

    pending_checks: tuple[str, ...] = ()
    """Admission checks that are not ready, with state and message."""

    requeue_at: str | None = None
    """Time until which Kueue does not try again."""

    body: Json = field(default_factory=dict)
    """The object itself, as patches need it."""

    @classmethod
    def parse(cls, body: Json) -> Self:
        """Reads a Workload as the API server returns it, in v1beta1 or v1beta2."""
        metadata, status = body["metadata"], body.get("status") or {}
        checks = [check for check in status.get("admissionChecks") or () if check.get("state") != "Ready"]
        return cls(
            name=metadata["name"],
            is_active=(body.get("spec") or {}).get("active") is not False,
            is_deactivated_by_us=DEACTIVATED_ANNOTATION in (metadata.get("annotations") or {}),
            conditions={each["type"]: _condition(each) for each in status.get("conditions") or ()},
            pending_checks=tuple(_describe_check(check) for check in checks),
            requeue_at=(status.get("requeueState") or {}).get("requeueAt"),
            body=body,
        )

    def holds(self, kind: str) -> WorkloadCondition | None:
        """Returns a condition that is true."""
        found = self.conditions.get(kind)
        return found if found is not None and found.is_true else None

    def fails(self, kind: str) -> WorkloadCondition | None:
        """Returns a condition that is false, and not one that is missing."""
        found = self.conditions.get(kind)
        return found if found is not None and not found.is_true else None


@dataclass(frozen=True)
class QueueView:
    """A run's queue as the operator sees it."""

    name: str
    """Name of the LocalQueue."""

    is_visible: bool = True
    """False if the operator was given no rights on Kueue's objects (the chart's value kueue.enabled)."""

    problem: str | None = None
    """Why the queue admits nothing until a person acts: Kueue or the LocalQueue is missing."""

    workload: Workload | None = None
    position: int | None = None
    """Place in the line, from 1; None if it is not known."""


def find_workload(bodies: list[Json], job_uid: str) -> Workload | None:
    """Returns the Workload that a Job, or a JobSet, controls; anybody may write its label on another one."""
    own = [body for body in bodies if controller_uid(body["metadata"]) == job_uid]
    return Workload.parse(max(own, key=lambda body: body["metadata"]["creationTimestamp"])) if own else None


def _condition(wire: Json) -> WorkloadCondition:
    message = str(wire.get("message") or "").strip()
    return WorkloadCondition(wire.get("status") == "True", str(wire.get("reason") or ""), message[:MAX_WORDS])


def _describe_check(check: Json) -> str:
    message = str(check.get("message") or "").strip()[:MAX_WORDS]
    return f"{check.get('name')} is {check.get('state')}" + (f" ({message})" if message else "")
