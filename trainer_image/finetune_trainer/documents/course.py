"""Time and speed of a run, from its logged steps."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_trainer.training.metrics_log import MetricLine


@dataclass(frozen=True)
class Course:
    """Time and speed of the training loop."""

    duration: str
    """From the first logged step to the last, such as 1 h 23 min; pauses between attempts are in it."""
    tokens_per_second: float | None
    """Median over the logged steps."""


def describe_course(lines: Sequence[MetricLine]) -> Course | None:
    """Returns the course of a run; None if no step was logged."""
    if not lines:
        return None
    speeds = [line.tokens_per_second for line in lines if line.tokens_per_second]
    seconds = (lines[-1].time - lines[0].time).total_seconds()
    return Course(_words(seconds), statistics.median(speeds) if speeds else None)


def _words(seconds: float) -> str:
    """Returns a time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
