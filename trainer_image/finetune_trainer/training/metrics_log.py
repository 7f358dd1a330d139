"""The metrics of a run, a line for every logged step and every evaluation. Needs no torch.

They lie in a file that every checkpoint carries, as TRL's own history has neither times nor speeds. A resumed run takes
over the file of its checkpoint, so no step is missing and none is there twice, wherever the run before it was stopped.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel

METRICS_FILE = "metrics.jsonl"


class MetricLine(ApiModel):
    """One line of metrics.jsonl."""

    step: Annotated[int, Field(ge=0)]
    """Finished optimiser steps."""
    time: datetime
    epoch: float | None = None
    loss: float | None = None
    """Training loss, in nats per supervised token; the mean over the steps since the line before."""
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    gpu_memory_bytes: int | None = None
    """Peak so far."""


class MetricsLog:
    """Writes metrics.jsonl below a folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_FILE
        folder.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)

    def add(self, step: int, **values: float | None) -> None:
        """Adds a line. Its fields are those of MetricLine; None leaves one out."""
        known = {name: value for name, value in values.items() if value is not None}
        line = MetricLine.model_validate({"step": step, "time": datetime.now(UTC), **known})
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line.model_dump_json(by_alias=True, exclude_none=True) + "\n")

    def lines(self) -> tuple[MetricLine, ...]:
        """All lines so far, in order."""
        text = self._path.read_text(encoding="utf-8") if self._path.is_file() else ""
        return tuple(MetricLine.model_validate_json(line) for line in text.splitlines())

    def save_into(self, checkpoint: Path) -> None:
        """Adds the lines so far to a checkpoint's folder."""
        if self._path.is_file():
            (checkpoint / METRICS_FILE).write_bytes(self._path.read_bytes())

    def restore_from(self, checkpoint: Path) -> None:
        """Takes over the lines of a checkpoint; one of an older version has none."""
        stored = checkpoint / METRICS_FILE
        if stored.is_file():
            self._path.write_bytes(stored.read_bytes())
