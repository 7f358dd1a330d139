"""Content that TRL's checkpoints lack: best adapter, samples and metrics so far, which a resumed run needs, and the
tokenizer as it is published."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from finetune_api.run_config import RunConfig
from finetune_trainer.distributed.world import ALONE, World
from finetune_trainer.training.best_adapter import BestAdapter
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.metrics_log import MetricsLog
from finetune_trainer.training.samples import Sampler, build_prompts


@dataclass(frozen=True)
class CheckpointedState:
    """The best adapter and the sampler, as far as the job asks for them, and the metrics."""

    best: BestAdapter | None = None
    sampler: Sampler | None = None
    sample_steps: int | None = None
    """Optimiser steps between two generations of samples; None: only at start and end."""
    metrics: MetricsLog | None = None
    write_companions: Callable[[Path], object] = lambda folder: None
    """Writes tokenizer and generation config beside an adapter, in place of those that TRL saves."""

    @classmethod
    def of_rank(cls, config: RunConfig, loaded: LoadedModel, evaluation: Any | None, work: Path) -> Self:
        """Returns what every rank of a run has: it looks for the best adapter, and takes its share of the samples.

        Raises TrainerError (InvalidConfiguration) for a prompt that cannot be asked.
        """
        training, tokenizer = config.training, loaded.tokenizer
        best = BestAdapter(work, training.early_stopping) if training.keeps_best() else None
        if training.samples is None:
            return cls(best)

        limit = config.model.max_sequence_length
        prompts = build_prompts(training.samples, tokenizer, evaluation, limit, loaded.embedding_rows)
        sampler = Sampler(prompts, training.samples, tokenizer, training.seed, work / "samples", loaded.window)
        return cls(best, sampler, training.evaluation_steps)

    @property
    def stops_early(self) -> bool:
        """True once early stopping has waited long enough for a lower evaluation loss."""
        return self.best is not None and self.best.is_exhausted

    def are_samples_due(self, step: int) -> bool:
        """True if the job wants samples of this step, and they have not been taken yet."""
        if self.sampler is None or not self.sample_steps:
            return False
        return step % self.sample_steps == 0 and not self.sampler.has(step)

    def take_due_samples(self, model: Any, step: int, world: World = ALONE) -> None:
        """Takes the samples of a step, if they are due, on all ranks of `world`. Raises InterruptedRunError if the run
        is asked to stop."""
        if self.sampler is not None and self.are_samples_due(step):
            self.sampler.take(model, step, world)

    def save_into(self, checkpoint: Path) -> None:
        """Adds the state to a checkpoint's folder."""
        for part in (self.best, self.sampler, self.metrics):
            if part is not None:
                part.save_into(checkpoint)
        self.write_companions(checkpoint)

    def restore_from(self, checkpoint: Path) -> None:
        """Takes over the state of the run that wrote the checkpoint."""
        for part in (self.best, self.sampler, self.metrics):
            if part is not None:
                part.restore_from(checkpoint)
