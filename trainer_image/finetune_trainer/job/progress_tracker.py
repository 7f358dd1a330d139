"""What the run is doing, kept in one place, and told to whoever listens: the operator (progress_reporter.py), or a
progress bar. Training only ever changes numbers in memory here."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
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

log = logging.getLogger(__name__)
# Share of the whole job at which each stage begins, in percent; training is the long one.
STAGE_START = {
    Stage.MODEL_LOADING: 0,
    Stage.ADAPTER_INJECTION: 5,
    Stage.DATA_FORMATTING: 6,
    Stage.TRAINING_CONFIGURATION: 9,
    Stage.TRAINING: 10,
    Stage.SAVING: 80,
    Stage.UPLOADING: 90,
}
MAX_PERCENT_BEFORE_COMMIT = 99
METRICS = ("loss", "eval_loss", "learning_rate", "tokens_per_second")


class ProgressTracker:
    """State of the run. Thread-safe; `listen` is called after every change, with whether the stage changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: list[StageTimes] = []
        self._values: dict[str, Any] = {}
        self._resolved = Resolved()
        self._memory: MemoryUse | None = None
        self._eta: int | None = None
        self._sequence = 0
        self._listeners: list[Callable[[bool], None]] = []
        self._transfer = TransferRate()

    def listen(self, listener: Callable[[bool], None]) -> None:
        """Call `listener` after every change; it must not block."""
        self._listeners.append(listener)

    def stage(self, stage: Stage) -> None:
        """A stage begins; the one before it ends."""
        now = datetime.now(UTC)
        with self._lock:
            self._end_stage(now)
            self._stages.append(StageTimes(name=stage, start_time=now))
        log.info("stage %s", stage)
        self._tell(stage_changed=True)

    def finish(self) -> None:
        """The last stage ends."""
        with self._lock:
            self._end_stage(datetime.now(UTC))

    def update(self, *, eta_seconds: int | None = None, **values: Any) -> None:
        """Change fields of `RunProgress`; None and numbers that are not finite leave a field as it is (JSON and the
        status have no NaN, and a loss that is not finite ends the run with a reason of its own)."""
        with self._lock:
            self._values |= {name: value for name, value in values.items() if value is not None and isfinite(value)}
            self._eta = eta_seconds if eta_seconds is not None else self._eta
        self._tell(stage_changed=False)

    def add_uploaded(self, count: int) -> None:
        """Bytes have been uploaded; called from any thread. Speed and time to the end follow from them."""
        with self._lock:
            done = self._values.get("uploaded_bytes", 0) + count
            self._values["uploaded_bytes"] = done
            if (rate := self._transfer.measure(done)) is not None:
                self._values["upload_bytes_per_second"] = round(rate)
                self._eta = int((self._values.get("upload_total_bytes", done) - done) / rate)
        self._tell(stage_changed=False)

    def resolve(self, **values: Any) -> None:
        """Say what something left to us became."""
        with self._lock:
            self._resolved = self._resolved.model_copy(update=values)

    def use_memory(self, memory: MemoryUse | None) -> None:
        """Say what the memory plan is, and what became of it."""
        with self._lock:
            self._memory = memory
        self._tell(stage_changed=False)

    @property
    def memory(self) -> MemoryUse | None:
        """The memory plan as it was said last."""
        return self._memory

    @property
    def resolved(self) -> Resolved:
        """Everything resolved so far."""
        return self._resolved

    @property
    def current_stage(self) -> Stage | None:
        """The stage that runs."""
        return self._stages[-1].name if self._stages else None

    def value(self, name: str) -> Any:
        """Newest value of a field, or None."""
        return self._values.get(name)

    def report(self) -> ProgressReport:
        """The whole state as the next report."""
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
                **values,
            )
            return ProgressReport(trainer_status=status, finetune=run)

    def percent(self) -> int:
        """Share of the whole job that is done."""
        with self._lock:
            return self._percent()

    def _percent(self) -> int:
        if not self._stages:
            return 0
        stage = self._stages[-1].name
        begin = STAGE_START[stage]
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

    def _tell(self, *, stage_changed: bool) -> None:
        for listener in self._listeners:
            listener(stage_changed)


class TransferRate:
    """Bytes per second over the last half minute: long enough that parts of 16 MiB, which end together, do not make it
    jump."""

    def __init__(self, window_seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window_seconds
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def measure(self, done: int) -> float | None:
        """The rate after `done` bytes in all; None until two moments can be compared."""
        now = self._clock()
        self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[0][0] < now - self._window:
            self._seen.popleft()
        then, before = self._seen[0]
        return (done - before) / (now - then) if now > then and done > before else None


class Speed:
    """Tokens per second and time to the end, over the steps of this process."""

    def __init__(self) -> None:
        self._began: tuple[float, int, int] | None = None

    def measure(self, step: int, total: int, tokens: int) -> tuple[float | None, int | None]:
        """(tokens per second, remaining seconds) after a step; the first step is warm-up and only starts the clock."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, step, tokens)
            return None, None
        start, first_step, first_tokens = self._began
        elapsed, steps = max(now - start, 1e-6), step - first_step
        return (tokens - first_tokens) / elapsed, int((total - step) * elapsed / max(steps, 1))
