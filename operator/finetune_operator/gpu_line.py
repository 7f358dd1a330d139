"""The jobs that wait for GPUs of a namespace's limit, in memory: when some are freed, the first in line are looked at.

Only a matter of speed. Who may start is read from the cluster at each look, and each job that waits is looked at now
and then in any case.
"""

from dataclasses import dataclass
from enum import Enum, auto

from finetune_operator.cluster.cluster import NamespacedName
from finetune_operator.decide.decision import Decision
from finetune_operator.decide.waiting.gpu_limit import FIRST_IN_LINE
from finetune_operator.observe.gpu_use import holds_gpus
from finetune_operator.observe.snapshot import AnySnapshot
from finetune_operator.status_reasons import StatusReason

GONE_SECONDS = 2.0
"""Time in which the garbage collector has removed the Job of a FineTuneJob that was deleted."""


class Place(Enum):
    """Relation of a job to its namespace's GPUs."""

    WAITS = auto()
    HOLDS = auto()


@dataclass(frozen=True)
class _Entry:
    name: NamespacedName
    created: str
    place: Place


class GpuLine:
    """The line of each namespace."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}  # by UID
        self._woken: dict[NamespacedName, float] = {}

    def note(self, name: NamespacedName, snapshot: AnySnapshot, decision: Decision) -> None:
        """Take in what a look found, and wake those whose wait it changes."""
        place = _place_of(snapshot, decision)
        old = self._entries.pop(snapshot.metadata.uid, None)
        if place is not None:
            created = snapshot.metadata.creation_timestamp or ""
            self._entries[snapshot.metadata.uid] = _Entry(name, created, place)

        # Whoever joins the line, or starts at once, changes nothing for those before.
        if old is not None and old.place is not place:
            self._wake(name.namespace, 0)

    def forget(self, uid: str) -> None:
        """Drop a job that is gone, and wake those that may have waited for it."""
        old = self._entries.pop(uid, None)
        if old is not None:
            self._wake(old.name.namespace, GONE_SECONDS)

    def take_woken(self) -> dict[NamespacedName, float]:
        """Returns the jobs to be looked at, once, each with the seconds until then."""
        woken, self._woken = self._woken, {}
        return woken

    def _wake(self, namespace: str, seconds: float) -> None:
        waiting = [
            (entry.created, entry.name)
            for entry in self._entries.values()
            if entry.place is Place.WAITS and entry.name.namespace == namespace
        ]
        self._woken |= {name: seconds for _, name in sorted(waiting)[:FIRST_IN_LINE]}


def _place_of(snapshot: AnySnapshot, decision: Decision) -> Place | None:
    if decision.reason == StatusReason.GPU_LIMIT_REACHED:
        return Place.WAITS
    if decision.actions.starts_training:
        return Place.HOLDS
    run = snapshot.training
    return Place.HOLDS if run.job is not None and holds_gpus(run.job, run.job_set) else None
