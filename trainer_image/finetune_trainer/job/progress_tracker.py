"""Live state of a run, in memory: stages, steps, losses, and what was resolved.

Listeners are called after every change: the reporter to the operator (reporter.py), or the live view of `finetune run`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from math import isfinite
from typing import Any

from finetune_api.progress import (
    MemoryUse,
    Metric,
    ProgressReport,
    Resolved,
    RunProgress,
    StageTimes,
    TrainerStatus,
)
from finetune_api.vocabulary import Stage
from finetune_trainer.job.disk_needs import DiskNeed
from finetune_trainer.job.energy import EnergyMeter
from finetune_trainer.signs_of_life import beat
from finetune_trainer.stopping import stop_point

log = logging.getLogger(__name__)
STAGE_START = {
    Stage.MODEL_LOADING: 0,
    Stage.ADAPTER_INJECTION: 5,
    Stage.DATA_FORMATTING: 6,
    Stage.TRAINING_CONFIGURATION: 9,
    Stage.TRAINING: 10,
    Stage.SAVING: 80,
    Stage.UPLOADING: 90,
}
"""Percent of the whole job at which each stage begins; training is the long one."""
MAX_PERCENT_BEFORE_COMMIT = 99
"""100 percent is reported by the outcome alone, once the result is committed."""
METRICS = ("loss", "eval_loss", "learning_rate", "tokens_per_second")


class ProgressTracker:
    """State of one run. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: list[StageTimes] = []
        self._values: dict[str, Any] = {}
        self._resolved = Resolved()
        self._memory: MemoryUse | None = None
        self.disk_needs: tuple[DiskNeed, ...] = ()
        """What the run writes to its disk beside model and rows, once that is known."""

        self._activity: str | None = None
        self._eta: int | None = None
        self._sequence = 0
        self._listeners: list[Callable[[bool], None]] = []
        self._transfer = TransferRate()
        self._meter: EnergyMeter | None = None

    def listen(self, listener: Callable[[bool], None]) -> None:
        """Calls `listener` after every change, with True if the stage changed; it must not block."""
        self._listeners.append(listener)

    def stage(self, stage: Stage) -> None:
        """Begins a stage and ends the one before it. Raises InterruptedRunError if the run is asked to stop."""
        stop_point()
        now = datetime.now(UTC)
        with self._lock:
            self._end_stage(now)
            self._stages.append(StageTimes(name=stage, start_time=now))

        log.info("stage %s", stage)
        self._notify(stage_changed=True)

    def finish(self) -> None:
        """Ends the last stage."""
        with self._lock:
            self._end_stage(datetime.now(UTC))

    def update(self, *, eta_seconds: int | None = None, **values: Any) -> None:
        """Changes fields of `RunProgress`. None, NaN and infinity leave a field as it is.

        JSON and the status have no NaN, and a loss that is not finite ends the run with a reason of its own.
        """
        with self._lock:
            self._values |= {name: value for name, value in values.items() if value is not None and isfinite(value)}
            self._eta = eta_seconds if eta_seconds is not None else self._eta

        self._notify(stage_changed=False)

    def add_uploaded(self, count: int) -> None:
        """Adds `count` uploaded bytes, and estimates speed and remaining time. Called from any thread."""
        with self._lock:
            done = self._values.get("uploaded_bytes", 0) + count
            self._values["uploaded_bytes"] = done

            if (rate := self._transfer.measure(done)) is not None:
                self._values["upload_bytes_per_second"] = round(rate)
                self._eta = int((self._values.get("upload_total_bytes", done) - done) / rate)

        self._notify(stage_changed=False)

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Says what the run does while its steps stand still. For people at the run's own machine: not in reports."""
        self._activity = activity
        self._notify(stage_changed=False)
        try:
            yield
        finally:
            self._activity = None
            self._notify(stage_changed=False)

    def resolve(self, **values: Any) -> None:
        """Sets what a value became that the job left to us, such as the precision."""
        with self._lock:
            self._resolved = self._resolved.model_copy(update=values)

    def use_memory(self, memory: MemoryUse | None) -> None:
        """Sets the memory plan and its measured peak."""
        with self._lock:
            self._memory = memory
        self._notify(stage_changed=False)

    def measure_energy(self, meter: EnergyMeter | None) -> None:
        """Has every report say what `meter` shows; None: nothing measures it."""
        self._meter = meter

    @property
    def seconds(self) -> float:
        """Seconds since the run began its first stage."""
        return (datetime.now(UTC) - self._stages[0].start_time).total_seconds() if self._stages else 0.0

    @property
    def energy_joules(self) -> int | None:
        """Energy of the run's GPUs so far; None if nothing measures it."""
        return self._meter.joules() if self._meter else None

    @property
    def memory(self) -> MemoryUse | None:
        """The memory plan as `use_memory` set it last."""
        return self._memory

    @property
    def resolved(self) -> Resolved:
        """Everything resolved so far."""
        return self._resolved

    @property
    def current_stage(self) -> Stage | None:
        """The stage that runs now, or ran last."""
        return self._stages[-1].name if self._stages else None

    @property
    def activity(self) -> str | None:
        """Work beside the steps that is under way, if any."""
        return self._activity

    @property
    def remaining_seconds(self) -> int | None:
        """Estimated time to the end of the stage."""
        return self._eta

    def value(self, name: str) -> Any:
        """Newest value of a field of `RunProgress`, or None."""
        return self._values.get(name)

    def report(self) -> ProgressReport:
        """Returns the whole state as the next report."""
        with self._lock:
            self._sequence += 1
            values = dict(self._values)

            metrics = tuple(Metric(name=name, value=f"{values[name]:.6g}") for name in METRICS if name in values)
            status = TrainerStatus(
                progress_percentage=self._percent(),
                estimated_remaining_seconds=self._eta,
                metrics=metrics,
                last_updated_time=datetime.now(UTC),
            )

            run = RunProgress(
                sequence=self._sequence,
                stage=self._stages[-1].name if self._stages else Stage.MODEL_LOADING,
                stages=tuple(self._stages),
                resolved=self._resolved,
                memory=self._memory,
                energy_joules=self.energy_joules,
                **values,
            )
            return ProgressReport(trainer_status=status, finetune=run)

    def percent(self) -> int:
        """Percent of the whole job that are done."""
        with self._lock:
            return self._percent()

    def _percent(self) -> int:
        if not self._stages:
            return 0

        stage = self._stages[-1].name
        # Within training and uploading, percent follow steps and bytes; other stages count when they end.
        begin = STAGE_START[stage]  # percent
        later = [start for start in STAGE_START.values() if start > begin]
        end = later[0] if later else MAX_PERCENT_BEFORE_COMMIT

        done, total = {
            Stage.TRAINING: (self._values.get("step"), self._values.get("total_steps")),
            Stage.UPLOADING: (self._values.get("uploaded_bytes"), self._values.get("upload_total_bytes")),
        }.get(stage, (None, None))

        share = min(1.0, done / total) if done and total else 0.0
        return int(begin + (end - begin) * share)

    def _end_stage(self, now: datetime) -> None:
        if self._stages and self._stages[-1].end_time is None:
            self._stages[-1] = self._stages[-1].model_copy(update={"end_time": now})

    def _notify(self, *, stage_changed: bool) -> None:
        beat()
        for listener in self._listeners:
            listener(stage_changed)


class TransferRate:
    """Bytes per second over the last half minute.

    A shorter window would make the rate jump: uploaded parts of 16 MiB end together.
    """

    def __init__(self, window_seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window_seconds
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def measure(self, done: int) -> float | None:
        """Returns the rate after `done` bytes in all; None until there are two moments to compare."""
        now = self._clock()
        self._seen.append((now, done))
        # Two moments stay, or a slow upload would have no rate.
        while len(self._seen) > 2 and self._seen[0][0] < now - self._window:
            self._seen.popleft()

        then, before = self._seen[0]
        return (done - before) / (now - then) if now > then and done > before else None


class Speed:
    """Tokens per second and time to the end, over the steps of this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: tuple[float, int, int] | None = None

    def measure(self, step: int, total: int, tokens: int) -> tuple[float | None, int | None]:
        """Returns (tokens per second, remaining seconds) after a step.

        The first step is warm-up: it only starts the clock.
        """
        now = self._clock()
        if self._began is None:
            self._began = (now, step, tokens)
            return None, None

        start, first_step, first_tokens = self._began
        elapsed, steps = max(now - start, 1e-6), step - first_step
        return (tokens - first_tokens) / elapsed, int((total - step) * elapsed / max(steps, 1))
