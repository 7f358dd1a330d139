"""Whole runs in this process, which a SIGTERM stops after a step of the test's choice."""

import os
import signal

from finetune_api.outcome import Outcome
from finetune_api.run_config import RunConfig
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal


def run_and_stop(
    config: RunConfig, settings: Settings, stop_after: int | None = None
) -> tuple[dict[int, float], Outcome]:
    """Returns losses by step (as reported, four digits), and the outcome; a SIGTERM arrives after `stop_after`."""
    progress, stop_signal, losses = ProgressTracker(), StopSignal(), {}
    stop_signal.install()

    def watch(_: bool) -> None:
        step, loss = progress.value("step"), progress.value("loss")
        if step is not None and loss is not None:
            losses[step] = loss
        if stop_after is not None and step == stop_after and not stop_signal.requested:
            os.kill(os.getpid(), signal.SIGTERM)

    progress.listen(watch)
    return losses, run_job(config, settings, progress, stop_signal)
