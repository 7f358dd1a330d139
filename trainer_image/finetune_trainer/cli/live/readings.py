"""Figures of a run in words, as the live view and the plain lines show them, and the losses so far."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune_api.vocabulary import Stage
from finetune_trainer.job.progress_tracker import ProgressTracker

GIGABYTE, MEGABYTE, GIBIBYTE = 1e9, 1e6, 1 << 30
STAGES = {
    Stage.MODEL_LOADING: ("model", "loading the base model"),
    Stage.ADAPTER_INJECTION: ("adapter", "adding the adapter"),
    Stage.DATA_FORMATTING: ("data", "turning rows into tokens"),
    Stage.TRAINING_CONFIGURATION: ("plan", "planning memory and steps"),
    Stage.TRAINING: ("training", "training"),
    Stage.SAVING: ("saving", "writing adapter, merged weights and GGUF files"),
    Stage.UPLOADING: ("publishing", "publishing the results"),
}
"""A word for each stage, and what happens in it."""

GROWING_FOLDERS = {
    Stage.MODEL_LOADING: ("base", "downloading the base model"),
    Stage.DATA_FORMATTING: ("data", "downloading the data"),
    Stage.SAVING: ("artifacts", "writing the results"),
}
"""Folders of the run's disk that fill in a stage, and what that means: no library reports the bytes of a download."""


class Readings:
    """Figures of one run, read from its tracker; `work` is the run's scratch folder."""

    def __init__(self, progress: ProgressTracker, work: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.progress = progress
        self.losses: list[tuple[int, float]] = []
        """(step, loss) of this process, as they were logged."""
        self.eval_losses: list[tuple[int, float]] = []
        self._work, self._clock = work, clock
        self._began = clock()
        self._activity: tuple[str | None, float] = (None, self._began)

    def note_change(self, _: bool = False) -> None:
        """Remembers the newest losses; a listener of the tracker."""
        step = self.progress.value("step")
        for name, points in (("loss", self.losses), ("eval_loss", self.eval_losses)):
            value = self.progress.value(name)
            # The step is reported before its loss, so a new step alone is no new loss.
            if value is not None and step is not None and (not points or points[-1][1] != value):
                points.append((step, value))

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._began

    def activity(self) -> str:
        """Says what the run does now, and for how long where that is long."""
        stage = self.progress.current_stage
        if stage is None:
            return "looking for a finished result"

        name = self.progress.activity or _first_step(self.progress, stage) or STAGES[stage][1]
        if self._activity[0] != name:
            self._activity = (name, self._clock())
        seconds = self._clock() - self._activity[1]

        lasting = f", {describe_seconds(seconds)} so far" if seconds >= 10 and stage is not Stage.TRAINING else ""
        return f"{self._transfer(stage) or name}{lasting}"

    def _transfer(self, stage: Stage) -> str:
        """Bytes of the stage that can be seen on the disk, or that the upload reports."""
        if stage is Stage.UPLOADING:
            names = ("uploaded_bytes", "upload_total_bytes", "upload_bytes_per_second")
            done, total, rate = (self.progress.value(name) or 0 for name in names)
            if not total:
                return ""
            return f"publishing {describe_bytes(done)} of {describe_bytes(total)} at {describe_bytes(rate)}/s"

        folder, meaning = GROWING_FOLDERS.get(stage, ("", ""))
        size = _size_of(self._work / folder) if folder else 0
        return f"{meaning}: {describe_bytes(size)}" if size else ""

    def position(self) -> str:
        """Step and epoch."""
        step, total, epoch = (self.progress.value(name) for name in ("step", "total_steps", "epoch"))
        if step is None:
            return ""
        return f"step {step:,}/{total:,}" + (f", epoch {epoch:.2f}" if epoch else "")

    def remaining(self) -> str:
        """Time to the end of training or of the upload."""
        seconds = self.progress.remaining_seconds
        return f"about {describe_seconds(seconds)} left" if seconds else ""

    def figures(self) -> Iterator[str]:
        """Speed, learning rate and GPU memory, as far as they are known."""
        speed, rate, memory = (
            self.progress.value(name) for name in ("tokens_per_second", "learning_rate", "gpu_memory_bytes")
        )
        if speed is not None:
            yield f"{speed:,.0f} tokens/s"
        if rate is not None:
            yield f"learning rate {rate:.2g}"
        if memory:
            yield f"{memory / GIBIBYTE:.1f} GiB GPU memory"

    def checkpoints(self) -> str:
        """Tells where the run began, and where it could begin again."""
        resumed, stored = self.progress.value("resumed_from_step"), self.progress.value("checkpoint_step")
        parts = [f"resumed from step {resumed:,}"] if resumed is not None else []
        parts += [f"checkpoint of step {stored:,} is stored"] if stored is not None else []
        return ", ".join(parts)


def _first_step(progress: ProgressTracker, stage: Stage) -> str | None:
    if stage is Stage.TRAINING and progress.value("step") is None:
        return "computing the first step"
    return None


def _size_of(folder: Path) -> int:
    """Bytes of the files below a folder that another thread is filling."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:  # a temporary file that has just been renamed
            continue
    return total


def describe_bytes(count: float) -> str:
    """Returns bytes in GB or MB."""
    return f"{count / GIGABYTE:.1f} GB" if count >= GIGABYTE else f"{count / MEGABYTE:.1f} MB"


def describe_seconds(seconds: float) -> str:
    """Returns a time as 45 s, 12 min or 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
