"""Energy of a pod's GPUs, from its reports and its last words, as far as they are believed (pure)."""

from collections.abc import Iterable, Iterator

from finetune_api.cost.energy import JOULES_PER_WATT_HOUR, is_believable
from finetune_api.cost.usage import Usage
from finetune_api.status import Attempt
from finetune_operator.observe.snapshot import AnySnapshot, Snapshot


def measured_joules(snapshot: AnySnapshot, pod_uid: str, held_seconds: int) -> int | None:
    """Returns the energy that a pod of the training has taken; None if it measured none, or said what cannot be.

    A counter only rises, so the largest value is the newest.
    """
    known = next((each.energy_joules for each in snapshot.status.attempts if each.uid == pod_uid), None)
    if not isinstance(snapshot, Snapshot):
        return known  # nobody knows the number of GPUs

    gpus = snapshot.spec.resources.gpus
    said = [joules for joules in _said(snapshot, pod_uid) if gpus and is_believable(joules, gpus, held_seconds)]
    return max((*said, *(() if known is None else (known,))), default=None)


def add_up_energy(
    last: Usage, attempts: Iterable[Attempt], dropped: Iterable[Attempt], gpus: int
) -> dict[str, float | int | None]:
    """Returns the fields of `Usage` about energy; attempts that the list has just dropped keep theirs. `gpus`: those of
    the pod that measures, which on several nodes is the first."""
    earlier = _add_measured((last.earlier_energy_joules, last.earlier_measured_seconds), dropped)
    joules, seconds = _add_measured(earlier, attempts)
    return {
        "energy_watt_hours": None if joules is None else round(joules / JOULES_PER_WATT_HOUR, 3),
        "energy_measured_gpu_seconds": None if seconds is None else seconds * gpus,
        "earlier_energy_joules": earlier[0],
        "earlier_measured_seconds": earlier[1],
    }


def _add_measured(before: tuple[int | None, int | None], attempts: Iterable[Attempt]) -> tuple[int | None, int | None]:
    """Adds joules and held seconds of the attempts that measured them; None if there is nothing to add."""
    joules, seconds = before
    for attempt in attempts:
        if attempt.energy_joules is not None:
            joules = (joules or 0) + attempt.energy_joules
            seconds = (seconds or 0) + (attempt.held_seconds or 0)
    return joules, seconds


def _said(snapshot: Snapshot, pod_uid: str) -> Iterator[int]:
    report = snapshot.training.report
    if report is not None and report.pod_uid == pod_uid and report.report.finetune.energy_joules is not None:
        yield report.report.finetune.energy_joules

    for pod in snapshot.training.pods:
        is_doubted = snapshot.training.doubt is not None and pod is snapshot.training.newest_pod
        outcome = pod.termination.outcome() if pod.uid == pod_uid and pod.termination and not is_doubted else None
        if outcome is not None and outcome.energy_joules is not None:
            yield outcome.energy_joules
