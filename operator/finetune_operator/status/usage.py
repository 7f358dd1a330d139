"""`status.usage`: GPU time, waiting and cost, from the pods and what was counted before (pure)."""

from finetune_api.cost.prices import Price
from finetune_api.cost.usage import Usage
from finetune_api.status import Attempt, FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import Phase, Stage
from finetune_operator.decide.gpu_budget import held_seconds
from finetune_operator.observe.snapshot import AnySnapshot, Snapshot

SECONDS_PER_HOUR = 3600


def count_held_seconds(snapshot: AnySnapshot, attempts: tuple[Attempt, ...]) -> tuple[Attempt, ...]:
    """Adds to each attempt the seconds that its pod has held a node, and to a new one the price that holds for it."""
    held = held_seconds(snapshot.status.attempts, snapshot.training.pods, snapshot.now)
    known = {attempt.uid: attempt.price_per_gpu_hour for attempt in snapshot.status.attempts}
    price = snapshot.price.per_hour if snapshot.price else None
    return tuple(
        attempt.model_copy(
            update={
                "held_seconds": held.get(attempt.uid, 0),
                "price_per_gpu_hour": known.get(attempt.uid, price),
            }
        )
        for attempt in attempts
    )


def build_usage(snapshot: AnySnapshot, status: FineTuneJobStatus) -> Usage | None:
    """Returns the usage of a job whose other status is built; None before a pod of it or an estimate was seen."""
    if not isinstance(snapshot, Snapshot):
        return snapshot.status.usage  # nobody knows the number of GPUs

    last, price, gpus = snapshot.status.usage or Usage(), snapshot.price, snapshot.spec.resources.gpus
    estimate = _estimate(status.preflight)
    if not status.attempts and estimate is None and snapshot.status.usage is None:
        return None

    # Attempts that the list has dropped keep their time and their cost.
    listed = {attempt.uid for attempt in status.attempts}
    dropped = [attempt for attempt in snapshot.status.attempts if attempt.uid not in listed]
    earlier_seconds = last.earlier_held_seconds + sum(attempt.held_seconds or 0 for attempt in dropped)
    earlier_cost = last.earlier_cost + sum(_cost(attempt, gpus) for attempt in dropped)

    held = earlier_seconds + sum(attempt.held_seconds or 0 for attempt in status.attempts)
    is_priced = price is not None or last.cost is not None
    cost = earlier_cost + sum(_cost(attempt, gpus) for attempt in status.attempts)

    return Usage(
        gpu_seconds=held * gpus,
        gpu_hours=round(held * gpus / SECONDS_PER_HOUR, 2),
        waiting_seconds=max(last.waiting_seconds, _waited(status, held)),
        currency=last.currency or (price.currency if price else None),
        cost=round(cost, 4) if is_priced else None,
        estimated_gpu_seconds=estimate,
        estimated_cost=last.estimated_cost if last.estimated_cost is not None else _estimated_cost(estimate, price),
        estimate_error_percent=_error(estimate, held * gpus) if status.phase is Phase.SUCCEEDED else None,
        earlier_held_seconds=earlier_seconds,
        earlier_cost=round(earlier_cost, 4),
    )


def without_time(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Leaves out what changes only because time passes."""
    attempts = tuple(attempt.model_copy(update={"held_seconds": None}) for attempt in status.attempts)
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


def _cost(attempt: Attempt, gpus: int) -> float:
    return (attempt.held_seconds or 0) * gpus * (attempt.price_per_gpu_hour or 0) / SECONDS_PER_HOUR
