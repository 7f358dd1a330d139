"""Stage 5: TRL's loop with our loss, checkpoints that go to storage, and an orderly stop."""

import gc
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_api.failures import FailureReason
from finetune_kernels.flat_adamw import FlatAdamW8bit
from finetune_trainer.artifacts.checkpoints import CheckpointStore
from finetune_trainer.batches import lay_end_to_end
from finetune_trainer.data_formatting import FormattedData
from finetune_trainer.documents.loss_plot import LossPoint
from finetune_trainer.engine import Engine
from finetune_trainer.errors import InterruptedRunError, TrainerError
from finetune_trainer.model_loading import LoadedModel
from finetune_trainer.progress import Progress, Speed
from finetune_trainer.termination import Termination
from finetune_trainer.training_configuration import choose_optimizer

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

    def metrics(self) -> dict[str, float]:
        """Summary for manifest and model card."""
        measured = {"steps": float(self.steps), "loss": self.loss, "evalLoss": self.eval_loss}
        return {name: value for name, value in measured.items() if value is not None}


class QloraTrainer(SFTTrainer):
    """TRL's trainer with our loss: TRL patches the model's forward with a loss of its own, so `compute_loss` is the
    door."""

    def __init__(self, *, model: Any, args: SFTConfig, engine: Engine, **options: Any) -> None:
        super().__init__(model=model, args=args, optimizer_cls_and_kwargs=choose_optimizer(args), **options)
        self.data_collator = lay_end_to_end  # TRL takes no collator of others as an option
        self._engine = engine
        self.model_accepts_loss_kwargs = True  # the loss divides by the whole step's tokens itself
        model.train, model.zero_grad = _TrainingMode(model), _NoGradients(model)
        assert isinstance(self.train_dataset, Dataset)
        self.train_dataset = self.train_dataset.with_format("numpy")  # a batch of lists takes milliseconds to collate
        self.trained_tokens = 0
        self._largest_batch = 0

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As TRL's, with what exists by now left out of Python's garbage collections, which would stop the launches."""
        gc.collect()
        gc.freeze()
        try:
            return super().train(*arguments, **options)
        finally:
            gc.unfreeze()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; where memory runs out, once more with a smaller memory plan.

        Gradients are copied before a batch that is larger than all before it, so that half a pass leaves no trace.
        """
        size = inputs["input_ids"].numel()
        if size <= self._largest_batch or self._engine.layers is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-untyped-call, no-any-return]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in trainable]
        while True:
            try:
                loss: torch.Tensor = super().training_step(model, dict(inputs), num_items_in_batch)  # type: ignore[no-untyped-call]
                break
            except torch.OutOfMemoryError as error:
                error.__traceback__ = None  # its frames hold the pass's tensors
            for parameter, gradient in zip(trainable, before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            if not self._engine.step_down():
                raise torch.OutOfMemoryError("the smallest memory plan does not fit this GPU")
        self._largest_batch = size
        return loss

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's
        if not isinstance(optimizer, FlatAdamW8bit):
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call, no-any-return]
        return optimizer.clip_gradients(self.args.max_grad_norm)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Loss of one batch; `return_outputs` never is asked for, as nothing here computes metrics from logits."""
        assert not return_outputs
        labels, positions = inputs.pop("labels"), inputs.pop("supervised")
        if model.training:
            self.trained_tokens += labels.numel()
        return self._engine.loss(model, inputs, labels, positions, num_items_in_batch)

    def floating_point_ops(self, inputs: Any) -> int:
        """Nobody reads the count, and transformers walks over all parameters for it at every batch."""
        return 0

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """TRL writes a card with every checkpoint; ours comes with the artifacts."""


class _TrainingMode:
    """`model.train` that goes through the modules only where the mode changes: the loop calls it for every batch, and
    a walk over two thousand modules keeps the GPU waiting."""

    def __init__(self, model: Any) -> None:
        self._model, self._switch = model, model.train

    def __call__(self, mode: bool = True) -> Any:
        return self._model if self._model.training == mode else self._switch(mode)


class _NoGradients:
    """`model.zero_grad` for the parameters that train, without a walk."""

    def __init__(self, model: Any) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __call__(self, set_to_none: bool = True) -> None:
        for parameter in self._parameters:
            parameter.grad = None


class RunCallback(TrainerCallback):
    """Progress, checks and checkpoints of one run."""

    def __init__(
        self, progress: Progress, checkpoints: CheckpointStore | None, termination: Termination, trained: "Trained"
    ) -> None:
        self._progress = progress
        self._checkpoints = checkpoints
        self._termination = termination
        self._trained = trained
        self._speed = Speed()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step; after a signal, write a checkpoint and stop."""
        speed, eta = self._speed.measure(state.global_step, state.max_steps, self._trained.tokens())
        self._progress.update(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=round(state.epoch or 0.0, 4),
            trained_tokens=self._trained.tokens(),
            tokens_per_second=round(speed, 1) if speed else None,
            gpu_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            eta_seconds=eta,
        )
        if self._termination.requested and state.global_step < state.max_steps:
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

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Send the checkpoint that was just written to storage."""
        if self._checkpoints is None:
            return
        self._checkpoints.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)
        self._progress.update(checkpoint_step=state.global_step)
        log.info("checkpoint of step %d is stored", state.global_step)


class Trained:
    """The trainer's token count, for a callback that is made before the trainer."""

    def __init__(self) -> None:
        self.trainer: QloraTrainer | None = None

    def tokens(self) -> int:
        """Tokens trained on by this process."""
        return self.trainer.trained_tokens if self.trainer else 0


def train(
    model: Any,
    loaded: LoadedModel,
    data: FormattedData,
    arguments: SFTConfig,
    engine: Engine,
    progress: Progress,
    checkpoints: CheckpointStore | None,
    termination: Termination,
) -> TrainingOutcome:
    """Train to the end, from the newest checkpoint if there is one.

    Raises InterruptedRunError after a signal (the checkpoint is stored then), and TrainerError (NonFiniteLoss, ...).
    """
    trained = Trained()
    callback = RunCallback(progress, checkpoints, termination, trained)
    trainer = trained.trainer = QloraTrainer(
        model=model,
        engine=engine,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=loaded.tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    for parameter in model.parameters():
        # TRL makes adapters of a quantised base bfloat16; where the computation is fp32 or fp16, they stay fp32.
        if parameter.requires_grad and not arguments.bf16:
            parameter.data = parameter.data.float()
    resumed = _restore(checkpoints, Path(str(arguments.output_dir)))
    if resumed is not None:
        progress.update(resumed_from_step=int(resumed.name.rpartition("-")[2]))
    with termination.deferred():
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    state = trainer.state
    if termination.requested and state.global_step < state.max_steps:
        stored = f"checkpoint of step {state.global_step} is stored" if checkpoints else "without a checkpoint"
        raise InterruptedRunError(f"stopped after step {state.global_step} of {state.max_steps}; {stored}")
    evaluated = any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
    if data.evaluation is not None and not evaluated:
        trainer.evaluate()
    return _summarise(state.global_step, state.log_history)


def _summarise(steps: int, log_history: list[dict[str, float]]) -> TrainingOutcome:
    losses = [LossPoint(int(entry["step"]), entry["loss"]) for entry in log_history if "loss" in entry]
    evaluations = [
        LossPoint(int(entry["step"]), entry["eval_loss"], True) for entry in log_history if "eval_loss" in entry
    ]
    last, last_evaluation = (points[-1].loss if points else None for points in (losses, evaluations))
    return TrainingOutcome(steps, last, last_evaluation, (*losses, *evaluations))


def _restore(checkpoints: CheckpointStore | None, output: Path) -> Path | None:
    """Folder of the newest checkpoint that can be used."""
    if checkpoints is None:
        return None
    step = checkpoints.restore_newest(output / "checkpoint-restored")
    if step is None:
        return None
    log.info("going on from the checkpoint of step %d", step)
    return (output / "checkpoint-restored").rename(output / f"checkpoint-{step}")
