"""The surroundings of a run in one value: its job, its folders, its storage, its progress and its stop signal."""

from collections.abc import Callable
from dataclasses import dataclass

from finetune_api.run_config import RunConfig
from finetune_trainer.artifacts.store import ArtifactStore
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal


@dataclass(frozen=True)
class TrainingContext:
    """The job, the place where it runs, and where its progress goes: what every rank has."""

    config: RunConfig
    settings: Settings
    progress: ProgressTracker
    stop_signal: StopSignal


@dataclass(frozen=True)
class RunContext(TrainingContext):
    """The run as rank 0 has it: with the place for its results."""

    store: ArtifactStore
    end: Callable[[TrainerError], None]
    """Ends the process with the outcome of an error, from any thread, if the main thread can no longer do so."""
