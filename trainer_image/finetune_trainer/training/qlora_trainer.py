"""TRL's trainer with our loss and optimiser; where GPU memory runs out, a pass is repeated with a smaller memory plan.

TRL replaces `model.forward` with a fused head and loss of its own, so a loss of ours is never called from there:
`compute_loss` is the place to put it.
"""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_api.vocabulary import Batching
from finetune_kernels.primitives.master_weights import master_weight, split_off_master
from finetune_kernels.primitives.multi_tensor_adamw import MultiTensorAdamW
from finetune_trainer.distributed.shares import evaluation_share
from finetune_trainer.distributed.world import ANOTHER_RANK
from finetune_trainer.errors import InterruptedRunError
from finetune_trainer.signs_of_life import beat
from finetune_trainer.stopping import request_stop
from finetune_trainer.training.batching.length_grouping import LengthGroupedSampler, row_lengths
from finetune_trainer.training.batching.rank_share import RankSampler, WithFiller, shuffled
from finetune_trainer.training.callback import RunCallback
from finetune_trainer.training.collator import COLLATORS, collate_and_count
from finetune_trainer.training.divergence.loss_scale import clip_scaled
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.fp8_gate import measure
from finetune_trainer.training.gradients import AccumulatedGradients, FastTrainMode, FastZeroGrad, trainable_weights
from finetune_trainer.training.memory.tried_pass import try_pass
from finetune_trainer.training.optimizer import choose_optimizer, create_schedule
from finetune_trainer.training.outcome import is_evaluated


class QloraTrainer(SFTTrainer):
    """SFTTrainer that computes through an Engine."""

    def __init__(
        self,
        *,
        model: Any,
        args: SFTConfig,
        engine: Engine,
        callback: RunCallback,
        **options: Any,
    ) -> None:
        """`model` is a peft model with the engine's kernels in it; `options` are SFTTrainer's."""
        optimizer = choose_optimizer(args)
        super().__init__(model=model, args=args, optimizer_cls_and_kwargs=optimizer, callbacks=[callback], **options)
        self.remove_callback(PrinterCallback)  # our callback logs

        self._engine, self._callback = engine, callback
        self._gradients: AccumulatedGradients | None = None
        self._evaluated = (0.0, 0)
        self.world = engine.world
        self._watch = callback.watch
        self._watch.scales_loss = engine.loss_scale is not None
        self.accelerator.scaler = engine.loss_scale  # in GradScaler's place

        # TRL accepts no collator of another kind as an option.
        self.data_collator = partial(collate_and_count, COLLATORS[engine.batching.kind])
        self.model_accepts_loss_kwargs = True  # our loss itself divides by the tokens of the whole step
        assert isinstance(self.train_dataset, Dataset)
        # Collating a batch of lists takes milliseconds; numpy arrays take none.
        self.train_dataset = self.train_dataset.with_format("numpy")

        model.train, model.zero_grad = FastTrainMode(model), FastZeroGrad(model)
        for parameter in model.parameters():
            # TRL casts adapters of a quantised base to bfloat16; where the model computes otherwise, they stay fp32.
            if parameter.requires_grad and not args.bf16:
                parameter.data = parameter.data.float()

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Trains like SFTTrainer, with all objects that exist by now exempt from Python's garbage collections.

        A collection walks over all of them and so stops the launches of kernels.
        """
        gc.collect()
        gc.freeze()
        try:
            result = super().train(*arguments, **options)
        finally:
            gc.unfreeze()
        self.world.check_equal("the adapter", self._masters())
        return result

    def _masters(self) -> list[torch.Tensor]:
        """The weights that train, in fp32."""
        return [master_weight(weight).detach() for _, weight in trainable_weights(self.model)]

    def create_optimizer(self, *arguments: Any, **options: Any) -> Any:
        """Returns the optimiser, over weights that are rank 0's in all processes."""
        weights = [weight.detach() for _, weight in trainable_weights(self.model)]
        self.world.copy_from_first_([*weights, *self._masters()])
        return super().create_optimizer(*arguments, **options)

    def _get_num_items_in_batch(self, *arguments: Any, **options: Any) -> Any:
        """Returns the supervised tokens of the whole step, in all processes: each divides its loss by them."""
        tokens = super()._get_num_items_in_batch(*arguments, **options)
        return tokens if self.world.is_alone else self.world.sum_(torch.as_tensor(tokens).clone())

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Logs like SFTTrainer, with the loss of all processes: each has its own rows' part of it."""
        if "loss" in logs:
            (logs["loss"],) = self.world.sum_numbers(logs["loss"], device=self.args.device)
        super().log(logs, *arguments, **options)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Runs one forward and backward pass, if need be again from its start with a smaller memory plan."""
        if self._engine.is_fp8_look_due(self.state.global_step):  # never amid a step: the next look is after it
            self._look_at_fp8(model, inputs)

        loss = self._pass(model, inputs, num_items_in_batch)
        self._watch.add_loss(loss)
        beat()
        return loss

    def _pass(self, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """Returns the loss of one forward and backward pass, if need be in less memory."""
        step = partial(super().training_step, model)
        if not self._engine.can_step_down:
            self._gradients = None
            return step(inputs, num_items_in_batch)  # type: ignore[no-any-return]

        self._gradients = gradients = self._gradients or AccumulatedGradients(model)
        before, tokens = gradients.save(), self._callback.trained_tokens

        def undo() -> None:
            gradients.restore(before)
            self._callback.trained_tokens = tokens

        # A pass takes entries out of `inputs`, so each attempt gets a copy.
        return self._in_less_memory(lambda: step(dict(inputs), num_items_in_batch), undo, trains=True)  # type: ignore[no-any-return]

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Returns the loss of one evaluation batch; if memory runs out, tries again with a smaller memory plan."""
        self._callback.stop_together()
        step, before = partial(super().prediction_step, model), self._evaluated
        if not self._engine.can_step_down:
            return step(inputs, *arguments, **options)

        def undo() -> None:
            self._evaluated = before

        return self._in_less_memory(lambda: step(dict(inputs), *arguments, **options), undo, trains=False)

    def _in_less_memory(self, attempt: Callable[[], Any], undo: Callable[[], None], *, trains: bool) -> Any:
        """Returns the result of `attempt`; after each one that runs out of memory, calls `undo` and takes a smaller
        plan."""
        while True:
            result, fits = try_pass(attempt, self._engine.window, self.world, trains=trains)
            if fits:
                return result
            undo()
            if not self._engine.step_down(self.state.global_step):
                raise torch.OutOfMemoryError("the smallest memory plan does not fit this GPU")
            self._callback.report_memory()

    def _look_at_fp8(self, model: Any, inputs: Any) -> None:
        """Lets a batch decide about FP8; it leaves no trace but the decision."""

        def compute() -> torch.Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, self._prepare_inputs(dict(inputs)))

        one_pass = partial(self._in_less_memory, partial(measure, model, compute), lambda: None, trains=True)
        self._engine.look_at_fp8(self.state.global_step, one_pass)
        self._callback.report_memory()

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Returns the weights that decay: a row of a new token is no difference to anything, and would fade."""
        return [name for name in super().get_decay_parameter_names(model) if "trainable_tokens" not in name]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Returns our schedule of the learning rate, made once."""
        if self.lr_scheduler is None:
            self.lr_scheduler = create_schedule(self.args, optimizer or self.optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Clips the gradients of a step and returns their norm before; the watch gets it with the step's loss."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        assert isinstance(optimizer, MultiTensorAdamW)
        norm = clip_scaled(optimizer, self.args.max_grad_norm, self.world.sum_, self._engine.loss_scale)

        self._watch.reduce_loss(self.world.sum_)
        self._watch.end_step(self.state.global_step + 1, norm)
        return norm

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Returns the loss of one batch, a scalar; in evaluation, summed over its supervised tokens."""
        assert not return_outputs  # nothing here computes metrics from logits
        labels, positions, tokens = map(inputs.pop, ("labels", "supervised", "tokens"))  # [B, T], [S], int

        if model.training:
            self._callback.trained_tokens += tokens
            return self._engine.loss(model, inputs, labels, positions, num_items_in_batch)

        loss = self._engine.loss(model, inputs, labels, positions, 1)
        total, count = self._evaluated
        self._evaluated = total + loss.item(), count + positions.numel()
        return loss

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """Evaluates like SFTTrainer, but reports the loss per supervised token over all batches.

        The mean of the batches' means would change with the micro-batch.
        """
        self._evaluated = (0.0, 0)
        stopped: InterruptedRunError | None = None
        with self._callback.evaluating():
            try:
                output = super().evaluation_loop(*arguments, **options)
            except InterruptedRunError as error:
                stopped = error

        # A rank that is asked to stop still meets the others, who learn of it here.
        total, count, stops = self.world.sum_numbers(*self._evaluated, stopped is not None, device=self.args.device)
        if stops:
            request_stop(ANOTHER_RANK)
            raise stopped or InterruptedRunError(f"stopped by {ANOTHER_RANK}")
        return output._replace(metrics=(output.metrics or {}) | {"eval_loss": total / max(1, count)})

    def _evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluates within the loop; if the run is asked to stop meanwhile, the checkpoint of this step comes first.

        The run that goes on from it evaluates the step (stages/training.py).
        """
        try:
            return super()._evaluate(*arguments, **options)
        except InterruptedRunError:
            self._callback.stop_with_checkpoint(self.control)
            return {}

    def is_evaluation_due(self, state: TrainerState) -> bool:
        """True if the state's step is one to evaluate, and has not been evaluated."""
        interval = self.args.eval_steps if self.args.eval_strategy == IntervalStrategy.STEPS else None
        return bool(interval) and state.global_step % int(interval or 1) == 0 and not is_evaluated(state)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes the adapter of a checkpoint, with its master weights."""
        values = {name: master_weight(weight).detach() for name, weight in trainable_weights(self.model)}
        super()._save(output_dir, state_dict or values)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Takes over the adapter of a checkpoint, with its master weights."""
        kinds = [(weight, weight.dtype) for _, weight in trainable_weights(self.model)]
        for weight, _ in kinds:
            weight.data = weight.data.float()  # or what is loaded would be rounded

        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for weight, dtype in kinds:
            if dtype is not torch.float32:
                split_off_master(weight, dtype)

    def load_adapter(self, checkpoint: Path, state: TrainerState) -> None:
        """Takes adapter and history from a checkpoint, without training on."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = state

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """Rows in random order; if they are padded, with those of like length beside each other."""
        is_padded = self._engine.batching.kind is Batching.PADDED
        if self.world.is_alone and not is_padded:
            return super()._get_train_sampler(train_dataset)

        rows, step = self.train_dataset, self._engine.batch.sequences * self.world.size
        assert isinstance(rows, Dataset)
        seed = self.args.seed
        order = LengthGroupedSampler(row_lengths(rows), step, seed) if is_padded else shuffled(rows, seed)
        return order if self.world.is_alone else RankSampler(order, step, self.world)

    def _get_dataloader(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
        """Returns a loader over this process's rows."""
        if not self.world.is_alone:
            dataset = WithFiller(dataset)
        return super()._get_dataloader(dataset, *arguments, **options)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Every N-th row in the rank's turn, and as many for each rank: one that goes empty takes FILLER."""
        if self.world.is_alone:
            return super()._get_eval_sampler(eval_dataset)
        return list(evaluation_share(len(eval_dataset), self.world.rank, self.world.size))

    def floating_point_ops(self, inputs: Any) -> int:
        """Returns 0: nobody reads the count, and transformers walks over all parameters for it at every batch."""
        return 0

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Does nothing: TRL writes a card with every checkpoint, and ours comes with the artifacts."""
