"""Helpers of tests that run a whole job on a GPU: the run, its losses, and the difference of two runs."""

from pathlib import Path
from typing import Any

import pytest

from finetune_api.outcome import Outcome, Result
from finetune_api.progress import RunProgress
from finetune_api.run_config import RunConfig
from finetune_trainer import pipeline
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.stages import training
from finetune_trainer.training.outcome import TrainingOutcome

Run = tuple[Outcome, RunProgress]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Training losses, unrounded, run after run."""
    found: list[list[float]] = []
    original = training.train

    def train(*arguments: Any, **options: Any) -> TrainingOutcome:
        outcome = original(*arguments, **options)
        found.append([point.loss for point in outcome.history if not point.is_evaluation])
        return outcome

    monkeypatch.setattr(pipeline, "train", train)
    return found


def run(config: RunConfig, folder: Path) -> Run:
    """Run a job on the GPU, which must succeed; returns its outcome and its reported progress."""
    progress = ProgressTracker()
    settings = Settings(folder / "work", "a", output_folder=folder / "out")
    outcome = run_job(config.model_copy(update={"gpus": 1}), settings, progress, StopSignal())
    assert outcome.result is Result.SUCCEEDED, outcome.message
    return outcome, progress.report().finetune


def largest_difference(found: list[float], expected: list[float]) -> float:
    """Largest relative difference between the losses of two runs of as many steps."""
    return max(abs(one - other) / other for one, other in zip(found, expected, strict=True))
