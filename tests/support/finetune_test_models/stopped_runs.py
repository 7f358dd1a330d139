"""Whole runs in this process, which a SIGTERM stops after a step of the test's choice."""

import os
import signal

from finetune_api.outcome import Outcome
from finetune_api.run_config import RunConfig
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal


def stopped_after(step: int | None) -> tuple[ProgressTracker, StopSignal]:
    """Returns what a run is watched and stopped by; a SIGTERM arrives after `step`, or never."""
    progress, stop_signal = ProgressTracker(), StopSignal()
    stop_signal.install()

    def watch(_: bool) -> None:
        if step is not None and progress.value("step") == step and not stop_signal.requested:
            os.kill(os.getpid(), signal.SIGTERM)

    progress.listen(watch)
    return progress, stop_signal


def run_and_stop(
    config: RunConfig, settings: Settings, stop_after: int | None = None
) -> tuple[dict[int, float], Outcome]:
    """Returns losses by step (as reported, four digits), and the outcome; a SIGTERM arrives after `stop_after`."""
    losses: dict[int, float] = {}
    progress, stop_signal = stopped_after(stop_after)

    def watch(_: bool) -> None:
        step, loss = progress.value("step"), progress.value("loss")
        if step is not None and loss is not None:
            losses[step] = loss

    progress.listen(watch)
    return losses, run_job(config, settings, progress, stop_signal)
