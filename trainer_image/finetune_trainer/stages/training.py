"""Stage 5: TRL's loop with our loss, checkpoints that go to storage, and an orderly stop."""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerState
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_kernels.primitives.multi_tensor_adamw import MultiTensorAdamW8bit
from finetune_trainer.artifacts.checkpoints import CheckpointStore
from finetune_trainer.errors import InterruptedRunError
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.stages.data_formatting import FormattedData
from finetune_trainer.stages.training_configuration import choose_optimizer
from finetune_trainer.training.best_adapter import EvaluationRecord
from finetune_trainer.training.callback import CheckpointedState, RunCallback
from finetune_trainer.training.collator import collate_packed
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.gradients import AccumulatedGradients, FastZeroGrad
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.records import LossPoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOutcome:
    """Where training ended."""

    steps: int
    loss: float | None
    """Last logged training loss, nats per supervised token."""
    eval_loss: float | None
    history: tuple[LossPoint, ...] = ()
    """Every logged loss, those before a resumption included."""
    best_step: int | None = None
    """Step whose adapter the model has now, where the best one is kept; else it is that of the last step."""
    best_eval_loss: float | None = None
    stopped_early: bool = False

    def metrics(self) -> dict[str, float]:
        """Summary for manifest and model card."""
        measured = {
            "steps": float(self.steps),
            "loss": self.loss,
            "evalLoss": self.eval_loss,
            "bestStep": None if self.best_step is None else float(self.best_step),
            "bestEvalLoss": self.best_eval_loss,
            "stoppedEarly": 1.0 if self.stopped_early else None,
        }
        return {name: value for name, value in measured.items() if value is not None}


class QloraTrainer(SFTTrainer):
    """TRL's trainer with our loss: TRL patches the model's forward with a loss of its own, so `compute_loss` is the
    door."""

    def __init__(
        self,
        *,
        model: Any,
        args: SFTConfig,
        engine: Engine,
        callback: RunCallback,
        **options: Any,
    ) -> None:
        optimizer = choose_optimizer(args)
        super().__init__(model=model, args=args, optimizer_cls_and_kwargs=optimizer, callbacks=[callback], **options)
        self.data_collator = collate_packed  # TRL takes no collator of others as an option
        self._engine, self._callback = engine, callback
        self.model_accepts_loss_kwargs = True  # the loss divides by the whole step's tokens itself
        model.train, model.zero_grad = FastTrainMode(model), FastZeroGrad(model)
        assert isinstance(self.train_dataset, Dataset)
        self.train_dataset = self.train_dataset.with_format("numpy")  # a batch of lists takes milliseconds to collate
        self._gradients: AccumulatedGradients | None = None
        self._evaluated = (0.0, 0)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As TRL's, with what exists by now left out of Python's garbage collections, which would stop the launches."""
        gc.collect()
        gc.freeze()
        try:
            return super().train(*arguments, **options)
        finally:
            gc.unfreeze()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; where memory runs out, once more with a smaller memory plan, as if the pass
        had not begun."""
        if self._engine.awaits_fp8_decision:
            self._engine.decide_fp8(lambda: self._untrained_loss(model, inputs))
            self._callback.report_memory()
        step = partial(super().training_step, model)
        if not self._engine.can_step_down:
            self._gradients = None
            return step(inputs, num_items_in_batch)  # type: ignore[no-any-return]
        self._gradients = gradients = self._gradients or AccumulatedGradients(model)
        before, tokens = gradients.copy(), self._callback.trained_tokens

        def undo() -> None:
            gradients.take_back(before)
            self._callback.trained_tokens = tokens

        return self._in_less_memory(lambda: step(dict(inputs), num_items_in_batch), undo)  # type: ignore[no-any-return]

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """The loss of one batch that is evaluated; where memory runs out, once more with a smaller memory plan."""
        step = partial(super().prediction_step, model)
        if not self._engine.can_step_down:
            return step(inputs, *arguments, **options)
        return self._in_less_memory(lambda: step(dict(inputs), *arguments, **options), lambda: None)

    def _in_less_memory(self, attempt: Callable[[], Any], undo: Callable[[], None]) -> Any:
        """`attempt`, again and again: each time that memory runs out, `undo` what it did and take a smaller plan."""
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError as error:
                error.__traceback__ = None  # its frames hold the pass's tensors
            undo()
            if not self._engine.step_down(self.state.global_step):
                raise torch.OutOfMemoryError("the smallest memory plan does not fit this GPU")
            self._callback.report_memory()

    @torch.no_grad()
    def _untrained_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        """Without dropout and noise."""
        model.eval()
        try:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, self._prepare_inputs(dict(inputs)))
        finally:
            model.train()

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's
        if not isinstance(optimizer, MultiTensorAdamW8bit):
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call, no-any-return]
        return optimizer.clip_gradients(self.args.max_grad_norm)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Loss of one batch; `return_outputs` never is asked for, as nothing here computes metrics from logits."""
        assert not return_outputs
        labels, positions = inputs.pop("labels"), inputs.pop("supervised")
        if model.training:
            self._callback.trained_tokens += labels.numel()
            return self._engine.loss(model, inputs, labels, positions, num_items_in_batch)
        loss = self._engine.loss(model, inputs, labels, positions, 1)
        total, count = self._evaluated
        self._evaluated = total + loss.item(), count + positions.numel()
        return loss

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """As TRL's, but with the loss per supervised token, however they are spread over batches: the mean of the
        batches' means would change with the micro-batch."""
        self._evaluated = (0.0, 0)
        output = super().evaluation_loop(*arguments, **options)
        total, count = self._evaluated
        return output._replace(metrics=(output.metrics or {}) | {"eval_loss": total / max(1, count)})

    def load_adapter(self, checkpoint: Path, state: TrainerState) -> None:
        """Take adapter and history from a checkpoint, without training on."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = state

    def floating_point_ops(self, inputs: Any) -> int:
        """Nobody reads the count, and transformers walks over all parameters for it at every batch."""
        return 0

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """TRL writes a card with every checkpoint; ours comes with the artifacts."""


class FastTrainMode:
    """`model.train` that goes through the modules only where the mode changes: the loop calls it for every batch, and
    a walk over two thousand modules keeps the GPU waiting."""

    def __init__(self, model: Any) -> None:
        self._model, self._switch = model, model.train

    def __call__(self, mode: bool = True) -> Any:
        return self._model if self._model.training == mode else self._switch(mode)


def train(
    model: Any,
    loaded: LoadedModel,
    data: FormattedData,
    arguments: SFTConfig,
    engine: Engine,
    progress: ProgressTracker,
    checkpoints: CheckpointStore | None,
    stop_signal: StopSignal,
    checkpointed: CheckpointedState,
) -> TrainingOutcome:
    """Train to the end, from the newest checkpoint if there is one, and leave the adapter that is to be exported in
    the model.

    Raises InterruptedRunError after a signal (the checkpoint is stored then), and TrainerError (NonFiniteLoss, ...).
    """
    callback = RunCallback(progress, checkpoints, stop_signal, checkpointed, engine)
    trainer = QloraTrainer(
        model=model,
        engine=engine,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=loaded.tokenizer,
        callback=callback,
    )
    trainer.remove_callback(PrinterCallback)
    for parameter in model.parameters():
        # TRL makes adapters of a quantised base bfloat16; where the computation is fp32 or fp16, they stay fp32.
        if parameter.requires_grad and not arguments.bf16:
            parameter.data = parameter.data.float()
    callback.report_memory()
    resumed = _restore(checkpoints, Path(str(arguments.output_dir)))
    if resumed is not None:
        checkpointed.restore_from(resumed)
        progress.update(resumed_from_step=int(resumed.name.rpartition("-")[2]))
    with stop_signal.deferred():
        _train(trainer, resumed, checkpointed)
    callback.report_memory()
    state = trainer.state
    progress.update(step=state.global_step, total_steps=state.max_steps)
    stopped_early = (
        checkpointed.best is not None and checkpointed.best.is_exhausted and state.global_step < state.max_steps
    )
    if stop_signal.requested and state.global_step < state.max_steps and not stopped_early:
        stored = f"checkpoint of step {state.global_step} is stored" if checkpoints else "without a checkpoint"
        raise InterruptedRunError(f"stopped after step {state.global_step} of {state.max_steps}; {stored}")
    progress.update(stopped_early=stopped_early or None)
    return _finish(trainer, checkpointed, stopped_early=stopped_early)


def _finish(trainer: QloraTrainer, checkpointed: CheckpointedState, *, stopped_early: bool) -> TrainingOutcome:
    """Evaluate where that was not done yet, and sample what is exported."""
    state = trainer.state
    evaluated = any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
    if trainer.eval_dataset is not None and not evaluated:
        trainer.evaluate()
    outcome = _summarise(state.global_step, state.log_history, checkpointed, stopped_early=stopped_early)
    if checkpointed.best is not None:
        checkpointed.best.load(trainer.model)
    if checkpointed.sampler is not None:
        step = state.global_step if outcome.best_step is None else outcome.best_step
        checkpointed.sampler.take(trainer.model, step)
    return outcome


def _train(trainer: QloraTrainer, resumed: Path | None, checkpointed: CheckpointedState) -> None:
    """Train on; not where the checkpoint is from the end of training, as the loop would make one step more."""
    if resumed is not None:
        state = TrainerState.load_from_json(str(resumed / "trainer_state.json"))
        if state.global_step >= state.max_steps or (checkpointed.best is not None and checkpointed.best.is_exhausted):
            trainer.load_adapter(resumed, state)
            return
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)


def _summarise(
    steps: int, log_history: list[dict[str, float]], checkpointed: CheckpointedState, *, stopped_early: bool
) -> TrainingOutcome:
    losses = [LossPoint(int(entry["step"]), entry["loss"]) for entry in log_history if "loss" in entry]
    evaluations = [
        LossPoint(int(entry["step"]), entry["eval_loss"], True) for entry in log_history if "eval_loss" in entry
    ]
    last, last_evaluation = (points[-1].loss if points else None for points in (losses, evaluations))
    record = checkpointed.best.record if checkpointed.best is not None else EvaluationRecord()
    return TrainingOutcome(
        steps=steps,
        loss=last,
        eval_loss=last_evaluation,
        history=(*losses, *evaluations),
        best_step=record.best_step,
        best_eval_loss=record.best_loss,
        stopped_early=stopped_early,
    )


def _restore(checkpoints: CheckpointStore | None, output: Path) -> Path | None:
    """Folder of the newest checkpoint that can be used."""
    if checkpoints is None:
        return None
    step = checkpoints.restore_newest(output / "checkpoint-restored")
    if step is None:
        return None
    log.info("going on from the checkpoint of step %d", step)
    return (output / "checkpoint-restored").rename(output / f"checkpoint-{step}")
