"""A run as plain lines, for logs and pipes: at once what is new, at intervals what moves, and a sign of life."""

import threading
import time
from collections.abc import Callable

from rich.console import Console

from finetune_api.vocabulary import Stage
from finetune_trainer.cli.live.readings import Readings

STEP_SECONDS = 10.0
"""Time between two lines about steps."""
QUIET_SECONDS = 30.0
"""Time without a line after which the run says what it does."""


class PlainLines:
    """Writes lines about a run; `clock` is in seconds."""

    def __init__(self, readings: Readings, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._readings, self._console, self._clock = readings, console, clock
        self._lock = threading.Lock()
        self._stage: Stage | None = None
        self._checkpoints, self._evaluations, self._step = "", 0, 0
        self._last = clock()

    def note_change(self, _: bool = False) -> None:
        """Writes what is new; a listener of the tracker, called from any thread."""
        readings, progress = self._readings, self._readings.progress
        with self._lock:
            if progress.current_stage is not self._stage:
                self._stage = progress.current_stage
                self._write(f"{self._stage}: {readings.activity()}")

            if (checkpoints := readings.checkpoints()) != self._checkpoints:
                self._checkpoints = checkpoints
                self._write(checkpoints)
            if len(readings.eval_losses) > self._evaluations:
                self._evaluations = len(readings.eval_losses)
                step, loss = readings.eval_losses[-1]
                self._write(f"evaluation after step {step:,}: loss {loss:.4f}")
            self._note_step()

    def tick(self) -> None:
        """Writes what the run does if there was no line for long; called every second or so."""
        with self._lock:
            if self._clock() - self._last >= QUIET_SECONDS:
                self._write(self._readings.activity())

    def _note_step(self) -> None:
        """Writes a step with its loss: the first, the last, and between them one every few seconds."""
        readings, progress = self._readings, self._readings.progress
        step = readings.losses[-1][0] if readings.losses else 0
        is_due = step == progress.value("total_steps") or self._clock() - self._last >= STEP_SECONDS
        if step == self._step or progress.value("step") != step or not (is_due or self._step == 0):
            return

        self._step = step
        loss = f"loss {readings.losses[-1][1]:.4f}"
        parts = (readings.position(), loss, *readings.figures(), readings.remaining())
        self._write(", ".join(part for part in parts if part))

    def _write(self, text: str) -> None:
        self._last = self._clock()
        self._console.print(text, markup=False, soft_wrap=True)
