"""What happens beside training: progress, checks of the loss, checkpoints, the best adapter and samples."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finetune_api.failures import FailureReason
from finetune_trainer.artifacts.checkpoints import CheckpointStore
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.progress_tracker import ProgressTracker, Speed
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.training.best_adapter import BestAdapter
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.samples import Sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointedState:
    """What goes along with training, and into every checkpoint."""

    best: BestAdapter | None = None
    sampler: Sampler | None = None
    sample_steps: int | None = None
    """Steps between two generations of samples; None: at start and end only."""

    def save_into(self, checkpoint: Path) -> None:
        """Make a checkpoint carry what is known."""
        for each in (self.best, self.sampler):
            if each is not None:
                each.save_into(checkpoint)

    def restore_from(self, checkpoint: Path) -> None:
        """Know what the run knew that wrote the checkpoint."""
        for each in (self.best, self.sampler):
            if each is not None:
                each.restore_from(checkpoint)


class RunCallback(TrainerCallback):
    """Reports progress, checks losses, and stores checkpoints with the state that goes into them."""

    def __init__(
        self,
        progress: ProgressTracker,
        checkpoints: CheckpointStore | None,
        stop_signal: StopSignal,
        checkpointed: CheckpointedState,
        engine: Engine,
    ) -> None:
        self._engine = engine
        self._progress = progress
        self._checkpoints = checkpoints
        self._stop_signal = stop_signal
        self._checkpointed = checkpointed
        self._speed = Speed()
        self.trained_tokens = 0
        """Tokens trained on by this process."""

    def report_memory(self) -> None:
        """Report the memory plan and its measured peak, and what became of FP8."""
        self._progress.use_memory(self._engine.memory_use())
        if (fp8_decision := self._engine.fp8_decision) is not None:
            self._progress.resolve(precision=fp8_decision.precision.value, precision_reason=fp8_decision.reason)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Samples of the model as it was before."""
        if self._checkpointed.sampler is not None and state.global_step == 0:
            self._checkpointed.sampler.take(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Count the step; after a signal, write a checkpoint and stop."""
        speed, eta = self._speed.measure(state.global_step, state.max_steps, self.trained_tokens)
        self._progress.update(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=round(state.epoch or 0.0, 4),
            trained_tokens=self.trained_tokens,
            tokens_per_second=round(speed, 1) if speed else None,
            gpu_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            eta_seconds=eta,
        )
        self.report_memory()
        interval = self._checkpointed.sample_steps
        if self._checkpointed.sampler is not None and interval and state.global_step % interval == 0:
            self._checkpointed.sampler.take(model, state.global_step)
        if self._stop_signal.requested and state.global_step < state.max_steps:
            control.should_save = self._checkpoints is not None
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Report losses; a loss that is no number ends the run."""
        logs = logs or {}
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                message = f"{name} is {logs[name]} after step {state.global_step}"
                raise TrainerError(FailureReason.NON_FINITE_LOSS, message)
        if logs.get("grad_norm") == 0.0:
            message = (
                f"the gradient is zero after step {state.global_step}: training has diverged, or nothing can be learned"
            )
            raise TrainerError(FailureReason.NON_FINITE_LOSS, message)
        known = ("loss", "eval_loss", "learning_rate")
        values: dict[str, Any] = {name: logs[name] for name in known if name in logs}
        if values:
            losses: dict[str, Any] = {name: round(values[name], 4) for name in values if name != "learning_rate"}
            self._progress.update(**(values | losses))
            log.info("step %d/%d %s", state.global_step, state.max_steps, values)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Keep the adapter if it is the best; stop where none better is to be expected."""
        best = self._checkpointed.best
        if best is None or not metrics or "eval_loss" not in metrics:
            return
        best.evaluated(model, state.global_step, metrics["eval_loss"])
        record = best.record
        self._progress.update(best_step=record.best_step, best_eval_loss=_rounded(record.best_loss))
        if best.is_exhausted and state.global_step < state.max_steps and not control.should_training_stop:
            log.info("stopping early: %d evaluations without a lower loss", record.waited)
            control.should_save = self._checkpoints is not None
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Send the checkpoint that was just written to storage."""
        if self._checkpoints is None:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._checkpointed.save_into(folder)
        self._checkpoints.save(folder, state.global_step)
        self._progress.update(checkpoint_step=state.global_step)
        log.info("checkpoint of step %d is stored", state.global_step)


def _rounded(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 4)
