"""`status.usage`: GPU time, waiting, energy and cost, from the pods and what was counted before (pure)."""

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_api.cost.prices import Price
from finetune_api.cost.usage import Usage
from finetune_api.status import Attempt, FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import Phase, Stage
from finetune_operator.decide.gpu_time import held_seconds
from finetune_operator.observe.snapshot import AnySnapshot, Snapshot
from finetune_operator.status.energy import add_up_energy, measured_joules

SECONDS_PER_HOUR = 3600


def count_held_seconds(snapshot: AnySnapshot, attempts: tuple[Attempt, ...]) -> tuple[Attempt, ...]:
    """Adds to each attempt the seconds that its pod has held a node and its energy, and to a new one its price."""
    held = held_seconds(snapshot.status.attempts, snapshot.training, snapshot.now)
    price = snapshot.price
    now = (price.per_hour, price.currency) if price else (None, None)
    known = {attempt.uid: (attempt.price_per_gpu_hour, attempt.currency) for attempt in snapshot.status.attempts}

    counted = []
    for attempt in attempts:
        per_hour, currency = known.get(attempt.uid, now)
        terms = {"price_per_gpu_hour": per_hour, "currency": currency}
        used = {
            "held_seconds": held.get(attempt.uid, 0),
            "energy_joules": measured_joules(snapshot, attempt.uid, held.get(attempt.uid, 0)),
        }
        counted.append(attempt.model_copy(update=terms | used))
    return tuple(counted)


def build_usage(snapshot: AnySnapshot, status: FineTuneJobStatus) -> Usage | None:
    """Returns the usage of a job whose other status is built; None before a pod of it or an estimate was seen."""
    if not isinstance(snapshot, Snapshot):
        return snapshot.status.usage  # nobody knows the number of GPUs

    last, price, gpus = snapshot.status.usage or Usage(), snapshot.price, snapshot.spec.resources.all_gpus
    estimate = _estimate(status.preflight)
    if not status.attempts and estimate is None and snapshot.status.usage is None:
        return None

    # Attempts that the list has dropped keep their time and their cost.
    listed = {attempt.uid for attempt in status.attempts}
    dropped = [attempt for attempt in snapshot.status.attempts if attempt.uid not in listed]
    earlier_seconds = last.earlier_held_seconds + sum(attempt.held_seconds or 0 for attempt in dropped)
    earlier = _earlier_cost(last) + _cost_of(dropped, gpus)

    held = earlier_seconds + sum(attempt.held_seconds or 0 for attempt in status.attempts)
    total = earlier + _cost_of(status.attempts, gpus)
    currency = total.currency or (price.currency if price else None)

    return Usage(
        gpu_seconds=held * gpus,
        gpu_hours=round(held * gpus / SECONDS_PER_HOUR, 2),
        waiting_seconds=max(last.waiting_seconds, _waited(status, held)),
        currency=currency,
        cost=total.amount if currency else None,
        estimated_gpu_seconds=estimate,
        estimated_cost=last.estimated_cost if last.estimated_cost is not None else _estimated_cost(estimate, price),
        estimate_error_percent=_error(estimate, held * gpus) if status.phase is Phase.SUCCEEDED else None,
        earlier_held_seconds=earlier_seconds,
        earlier_cost=earlier.amount if earlier_seconds else None,
        **add_up_energy(last, status.attempts, dropped, snapshot.spec.resources.gpus),
    )


@dataclass(frozen=True)
class _Money:
    """A sum of money. Without an amount it is not known, and no sum with it is."""

    amount: float | None = 0.0
    currency: str | None = None

    def __add__(self, other: "_Money") -> "_Money":
        currencies = {self.currency, other.currency} - {None}
        if self.amount is None or other.amount is None or len(currencies) > 1:
            return _Money(None)
        return _Money(round(self.amount + other.amount, 4), next(iter(currencies), None))


def _cost_of(attempts: Iterable[Attempt], gpus: int) -> _Money:
    total = _Money()
    for attempt in attempts:
        hours = (attempt.held_seconds or 0) * gpus / SECONDS_PER_HOUR
        if hours:
            price = attempt.price_per_gpu_hour
            total += _Money(None if price is None else hours * price, attempt.currency)
    return total


def _earlier_cost(last: Usage) -> _Money:
    return _Money(last.earlier_cost, last.currency) if last.earlier_held_seconds else _Money()


def without_time(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Leaves out what changes only because time passes."""
    attempts = tuple(
        attempt.model_copy(update={"held_seconds": None, "energy_joules": None}) for attempt in status.attempts
    )
    return status.model_copy(update={"active_seconds": None, "usage": None, "attempts": attempts})


def _waited(status: FineTuneJobStatus, held: int) -> int:
    """Returns the seconds in which a Job of the job was active and no pod of it held a node."""
    checks = next((stage for stage in status.stages if stage.name is Stage.PREFLIGHT), None)
    checked = (checks.end_time - checks.start_time).total_seconds() if checks and checks.end_time else 0
    return max(0, int((status.active_seconds or 0) - held - checked))


def _estimate(preflight: PreflightStatus | None) -> int | None:
    hours = preflight.gpu_hours if preflight else None
    return None if hours is None else int(hours * SECONDS_PER_HOUR)


def _estimated_cost(estimate: int | None, price: Price | None) -> float | None:
    if estimate is None or price is None:
        return None
    return round(estimate / SECONDS_PER_HOUR * price.per_hour, 4)


def _error(estimate: int | None, gpu_seconds: int) -> float | None:
    return round(100 * (gpu_seconds / estimate - 1), 1) if estimate else None
