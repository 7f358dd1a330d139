"""Hooks into the training loop: progress, checks of the loss, checkpoints, the best adapter and samples."""

import logging
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finetune_api.failures import FailureReason
from finetune_trainer.artifacts.checkpoints import CheckpointStore
from finetune_trainer.distributed.world import ANOTHER_RANK
from finetune_trainer.errors import InterruptedRunError, TrainerError
from finetune_trainer.job.progress_tracker import ProgressTracker, Speed
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.signs_of_life import beat
from finetune_trainer.stopping import is_requested, raise_if_requested, request_stop
from finetune_trainer.training.checkpointed_state import CheckpointedState
from finetune_trainer.training.divergence.checkpoint_files import find_non_finite
from finetune_trainer.training.divergence.step_watch import StepWatch
from finetune_trainer.training.engine import Engine

log = logging.getLogger(__name__)


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
        self._all_tokens = 0
        """Tokens trained on by all ranks."""
        self.trained_tokens = 0
        """Tokens trained on by this rank."""
        self._stops = False
        """Whether a rank was asked to stop by the end of the newest step: what all of them go by."""
        self.watch = StepWatch()
        """Looks at every step; the trainer hands it what a step computed."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Reports that the loop evaluates, while it does."""
        return self._progress.doing("evaluating the held-out rows")

    def report_memory(self) -> None:
        """Reports the memory plan with its measured peak, and the decision about FP8."""
        self._progress.use_memory(self._engine.memory_use())
        if (fp8_decision := self._engine.fp8_decision) is not None:
            self._progress.resolve(precision=fp8_decision.precision.value, precision_reason=fp8_decision.reason)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Recalls the losses of a run that goes on, and takes samples of the model before training."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.watch.history.restore(losses, max(1, int(args.logging_steps)))
        if self._checkpointed.sampler is not None and state.global_step == 0:
            with self._progress.doing("taking samples of the model before training"):
                self._checkpointed.sampler.take(model, 0, self._engine.world)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Reports the step and takes samples when they are due; after a signal, ends the loop with a checkpoint."""
        self._meet(state)
        speed, eta = self._speed.measure(state.global_step, state.max_steps, self._all_tokens)
        self._progress.update(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=round(state.epoch or 0.0, 4),
            trained_tokens=self._all_tokens,
            tokens_per_second=round(speed, 1) if speed else None,
            gpu_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            eta_seconds=eta,
        )
        self.report_memory()

        if self._checkpointed.are_samples_due(state.global_step):
            self.watch.catch_up()  # nothing can be drawn from NaN
            try:
                with self._progress.doing(f"taking samples of step {state.global_step}"):
                    self._checkpointed.take_due_samples(model, state.global_step, self._engine.world)
            except InterruptedRunError:
                log.info("the samples of step %d are left to the run that goes on from here", state.global_step)
        if self._is_stopping:
            self.stop_with_checkpoint(control)

    @property
    def _is_stopping(self) -> bool:
        """True if the loop is to end: what all ranks have agreed on, or, in a run of one, what was asked by now."""
        return self._stops or (self._engine.world.is_alone and self._stop_signal.requested)

    def _meet(self, state: Any) -> None:
        """Tells the other ranks of a step what they must agree on: whether to stop, and the memory plan.

        The slowest rank sets the pace, so all take the smallest plan that one of them needs.
        """
        engine = self._engine
        own = (self.trained_tokens, self._stop_signal.requested, engine.plan_number)
        tokens, stops, plans = zip(*engine.world.gather_numbers(*own), strict=True)
        self._all_tokens = int(sum(tokens))
        self._stops = any(stops)
        if self._stops:
            request_stop(ANOTHER_RANK)
        while engine.plan_number < max(plans):
            engine.step_down(state.global_step)
        if not engine.world.is_alone:
            self._progress.resolve(slowest_rank_share=round(max(tokens) / max(1.0, sum(tokens)), 4))

    def stop_with_checkpoint(self, control: Any) -> None:
        """Makes TRL's loop end after this step, with a checkpoint and before any evaluation. On all ranks at once."""
        self._stops = True
        control.should_evaluate = False
        control.should_save = self._checkpoints is not None
        control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends an evaluation between two batches. Raises InterruptedRunError if the run is asked to stop."""
        if self._engine.window is None:
            raise_if_requested()

    def stop_together(self) -> None:
        """Ends an evaluation before a batch that all ranks have to make. Raises InterruptedRunError on all of them if
        one is asked to stop."""
        if self._engine.window is None:
            return

        beat()
        if any(stops for (stops,) in self._engine.world.gather_numbers(is_requested())):
            request_stop(ANOTHER_RANK)
            raise_if_requested()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Reports losses. Raises TrainerError (NonFiniteLoss) for one that is no number."""
        logs = logs or {}
        self.watch.catch_up()  # whoever logs has waited for the GPU already
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            message = f"the evaluation loss is {logs['eval_loss']} after step {state.global_step}"
            raise TrainerError(FailureReason.NON_FINITE_LOSS, message)

        known = ("loss", "eval_loss", "learning_rate")
        values: dict[str, Any] = {name: logs[name] for name in known if name in logs}
        if values:
            losses: dict[str, Any] = {name: round(values[name], 4) for name in values if name != "learning_rate"}
            self._progress.update(**(values | losses))
            log.info("step %d/%d %s", state.global_step, state.max_steps, values)
            self._keep_metrics(state, values | {"grad_norm": logs.get("grad_norm")})

    def _keep_metrics(self, state: Any, values: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        if self._checkpointed.metrics is None:
            return

        speed = self._progress.value("tokens_per_second") if "loss" in values else None
        epoch = round(state.epoch or 0.0, 4)
        memory = self._progress.value("gpu_memory_bytes")
        measured = {"epoch": epoch, "tokens_per_second": speed, "gpu_memory_bytes": memory}
        self._checkpointed.metrics.add(state.global_step, **values, **measured)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Keeps the adapter if it is the best so far; ends the loop once early stopping has waited long enough."""
        best = self._checkpointed.best
        if best is None or not metrics or "eval_loss" not in metrics:
            return

        best.evaluated(model, state.global_step, metrics["eval_loss"])
        record = best.record
        self._progress.update(best_step=record.best_step, best_eval_loss=_rounded(record.best_loss))

        # Not where the loop ends anyway: a signal is no early stop.
        if best.is_exhausted and state.global_step < state.max_steps and not control.should_training_stop:
            log.info("stopping early: the last %d evaluations found no lower loss", record.waited)
            control.should_save = self._checkpoints is not None
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stores the checkpoint that TRL has just written to this disk, unless the loss is far above its best.

        Raises TrainerError (NonFiniteLoss) instead if it holds a number that is none: the checkpoints before it stay.
        """
        if self._checkpoints is None:
            return
        self.watch.catch_up()
        if (since := self.watch.history.bad_since) is not None:
            log.warning(
                "no checkpoint of step %d: the loss is far above its best since step %d", state.global_step, since
            )
            control.should_training_stop = control.should_training_stop or self._is_stopping
            return

        # TRL's callbacks run after its own files are written.
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._checkpointed.save_into(folder)
        if (found := find_non_finite(folder)) is not None:
            message = f"the checkpoint of step {state.global_step} is not stored: it has {found}"
            raise TrainerError(FailureReason.NON_FINITE_LOSS, message)

        with self._progress.doing(f"storing the checkpoint of step {state.global_step}"):
            self._checkpoints.save(folder, state.global_step)
        self._progress.update(checkpoint_step=state.global_step)
        log.info("checkpoint of step %d is stored", state.global_step)
        if self._is_stopping:
            control.should_training_stop = True


def _rounded(loss: float | None) -> float | None:
    """The loss to 4 decimals, as the status shows it."""
    return None if loss is None else round(loss, 4)
