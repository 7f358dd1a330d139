"""`status.progress` from reports and outcomes (pure)."""

from typing import Any

from finetune_api.outcome import Outcome
from finetune_api.progress import Resolved
from finetune_api.status import ProgressStatus
from finetune_operator.observe.report_store import ReceivedReport

ALMOST_DONE = 99  # percent; 100 means that the artifacts are uploaded, which only the outcome can say

# Fields with the same name and meaning in reports and in the status.
_SAME_NAMES = (
    "step",
    "total_steps",
    "epoch",
    "loss",
    "eval_loss",
    "best_step",
    "best_eval_loss",
    "stopped_early",
    "learning_rate",
    "tokens_per_second",
    "trained_tokens",
    "gpu_memory_bytes",
    "uploaded_bytes",
    "upload_total_bytes",
    "upload_bytes_per_second",
    "sequence",
)


def merge_report(last: ProgressStatus | None, received: ReceivedReport) -> ProgressStatus:
    """Returns the progress with what a report says; what it does not say stays."""
    run, common = received.report.finetune, received.report.trainer_status
    percent = min(common.progress_percentage, ALMOST_DONE)

    # None means that the report does not say it, which must not erase what is known.
    reported = {name: getattr(run, name) for name in _SAME_NAMES if getattr(run, name) is not None}
    fields: dict[str, Any] = reported | {
        "percent": percent,
        "completion": f"{percent}%",
        "eta_seconds": common.estimated_remaining_seconds,
        "eta": format_duration(common.estimated_remaining_seconds),
        "last_report_time": received.received,
    }
    return (last or ProgressStatus()).model_copy(update=fields)


def add_speed_of_each(progress: ProgressStatus, resolved: Resolved | None) -> ProgressStatus:
    """Adds the speed of each process of a run of several."""
    world, speed = resolved.world_size if resolved else None, progress.tokens_per_second
    if world is None or speed is None:
        return progress
    return progress.model_copy(update={"tokens_per_second_per_gpu": round(speed / world, 1)})


def merge_outcome(last: ProgressStatus | None, outcome: Outcome) -> ProgressStatus | None:
    """Returns the progress with what an outcome says; None if neither says anything."""
    names = ("step", "total_steps", "loss", "eval_loss", "best_step", "best_eval_loss", "stopped_early")
    reported = {name: getattr(outcome, name) for name in names if getattr(outcome, name) is not None}
    if last is None and not reported:
        return None
    return (last or ProgressStatus()).model_copy(update=reported)


def format_duration(seconds: int | None) -> str | None:
    """Formats seconds for people: 45s, 12m30s, 3h05m, 2d04h."""
    if seconds is None:
        return None

    minutes, rest = divmod(seconds, 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)

    if days:
        return f"{days}d{hours_left:02d}h"
    if hours:
        return f"{hours}h{minutes_left:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
