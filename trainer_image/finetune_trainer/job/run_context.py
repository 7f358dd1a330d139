"""The surroundings of a run in one value: its job, its folders, its storage, its progress and its stop signal."""

from dataclasses import dataclass

from finetune_api.run_config import RunConfig
from finetune_trainer.artifacts.store import ArtifactStore
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal


@dataclass(frozen=True)
class RunContext:
    """The job, the place where it runs, and where its results and its progress go."""

    config: RunConfig
    settings: Settings
    store: ArtifactStore
    progress: ProgressTracker
    stop_signal: StopSignal
