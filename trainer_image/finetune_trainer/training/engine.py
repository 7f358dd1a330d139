"""Chooses how a run computes: with our kernels on a GPU in 16 bits, with plain PyTorch elsewhere.

The choice is made once, from the model's shape and the free memory, and logged. If memory runs out all the same, the
next smaller memory plan takes over.
"""

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from finetune_api.progress import MemoryFallback, MemoryUse
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Batching, MemoryMode, Precision
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.layer_check import why_not_fused
from finetune_kernels.layers.packed_attention import use_packed_attention
from finetune_kernels.layers.patching import patch_model
from finetune_kernels.layers.supervised_loss import causal_model, fused_supervised_loss, has_plain_head
from finetune_kernels.planning.families import family_of
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory, plan_unfused_layers, smaller_plan
from finetune_kernels.planning.micro_batch import (
    MicroBatch,
    choose_micro_batch,
    default_micro_batch,
    largest_without_recompute,
    written_micro_batch,
)
from finetune_kernels.planning.model_shape import ModelShape
from finetune_kernels.planning.parts.mixer_shape import cost_of_missing
from finetune_kernels.planning.rates import UNLIMITED, Machine
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_kernels.streaming.layer_window import LayerWindow
from finetune_kernels.vocabulary.host_vocabulary import bring_back, move_to_host
from finetune_trainer.distributed.shares import split_batch
from finetune_trainer.distributed.world import ALONE, World
from finetune_trainer.training.batching.isolation import PACKED, BatchingChoice, choose_batching
from finetune_trainer.training.batching.trial import try_step
from finetune_trainer.training.divergence.loss_scale import LossScale
from finetune_trainer.training.fp8_gate import Fp8Decision, Measured, decide, next_look
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.losses import supervised_loss
from finetune_trainer.training.memory.calibration import calibrated
from finetune_trainer.training.memory.loaded_shape import loaded_shape
from finetune_trainer.training.memory.recorded_passes import record_passes, stop_recording
from finetune_trainer.training.memory.room import Room, multiplies_fp8

log = logging.getLogger(__name__)
SHARDED = "each GPU keeps a part of the weights only, and FP8 needs all of them there"
NO_WEIGHTS = "FP8 takes none of the weights: it needs rows of whole blocks of 64"
OTHERS_REFUSE = "another rank's batch changes too much in FP8"
Loss = Callable[[Any, Mapping[str, Any], torch.Tensor, torch.Tensor, torch.Tensor | int | None], torch.Tensor]
"""(model, inputs, labels, positions, num_items) -> scalar; see losses.supervised_loss."""


@dataclass
class Engine:
    """The chosen loss, micro-batch, memory plan and fused layers of a run."""

    recompute_activations: bool
    """True if TRL's activation checkpointing is to be on; fused layers recompute by their own plan."""
    loss: Loss
    batch: MicroBatch
    plan: MemoryPlan | None = None
    """None if layers are not fused: nothing is planned layer by layer then."""
    layers: FusedLayers | None = None
    replan: Callable[[MemoryMode, int], MemoryPlan] | None = None
    """Returns the plan of another mode for the same micro-batch, on a GPU of so many bytes at most."""
    next_fp8_look: int | None = None
    """Finished steps after which a batch decides about FP8; None if the job does not ask for it, or BF16 stays."""
    fp8_decision: Fp8Decision | None = None
    """None if the job does not ask for FP8, or the first batch has yet to decide."""
    batching: BatchingChoice = PACKED
    """Arrangement of a micro-batch's documents in which none sees another."""
    fallbacks: list[MemoryFallback] = field(default_factory=list, init=False)
    """Each time that memory ran out and a smaller plan took over."""
    loss_scale: LossScale | None = None
    """None unless the run computes in fp16."""
    window: LayerWindow | None = None
    """The layers' weights, if each rank keeps a part of them; then all ranks have to make the same passes."""
    streamed: HostLayers | None = None
    """The layers whose weights stream from host memory, by the plan."""
    world: World = field(default=ALONE, init=False)
    """The processes that train together; `batch` is this one's part of a step."""

    def use_world(self, world: World) -> None:
        """Takes this process's share of every step, which the job's spec makes a whole number of sequences."""
        self.world, self.batch = world, split_batch(self.batch, world.size)

    def use_batching(self, choice: BatchingChoice) -> None:
        """Takes the batching in which documents are apart; single documents are accumulated to the same step."""
        self.batching = choice
        if choice.kind is Batching.SINGLE:
            self.batch = MicroBatch(1, self.batch.sequences)

    @property
    def plan_number(self) -> int:
        """Place of the memory plan in the order from the largest to the smallest; 0 without one."""
        return list(MemoryMode).index(self.plan.mode) if self.plan is not None else 0

    @property
    def can_step_down(self) -> bool:
        """True if there is a smaller memory plan."""
        return self.layers is not None and self.plan is not None and not self.plan.is_smallest

    def step_down(self, step: int) -> bool:
        """Gives up graphs or takes the next smaller memory plan, after memory ran out with `step` steps finished; False
        if there is neither."""
        if self.plan is None or self.layers is None or self.replan is None:
            return False
        if stop_recording(self.layers):
            return True
        smaller = smaller_plan(self.plan, self.replan)
        if smaller is None:
            return False

        gc.collect()  # cycles of frames may hold tensors of the interrupted pass
        self.layers.keep_weights(smaller.kept_layers)
        self.layers.set_policies(smaller.policies)
        if smaller.host_bytes:
            self.layers.move_vocabulary()
        torch.cuda.empty_cache()
        if self.streamed is not None:
            self.streamed.stream(smaller.streamed_layers)

        self.fallbacks.append(MemoryFallback(step=step, from_mode=self.plan.mode, to_mode=smaller.mode))
        self.plan = smaller
        log.warning("out of GPU memory after step %d: continuing with a smaller plan\n%s", step, describe_plan(smaller))
        return True

    def is_fp8_look_due(self, step: int) -> bool:
        """True if a batch is to decide about FP8, with `step` steps finished. The same on all ranks."""
        return self.next_fp8_look is not None and step >= self.next_fp8_look

    def look_at_fp8(self, step: int, measure: Callable[[], Measured]) -> None:
        """Decides for or against FP8, with all ranks; `measure` computes a batch, if need be in less memory."""
        decision = self._try_fp8(step, measure)
        everywhere = all(chosen for (chosen,) in self.world.gather_numbers(decision.is_fp8))
        if decision.is_fp8 and not everywhere:
            decision = Fp8Decision(Precision.BF16, OTHERS_REFUSE)

        if not everywhere:
            assert self.layers is not None
            self.layers.use_compute_dtype()
            if step and self.fp8_decision is not None and self.fp8_decision.is_fp8:
                decision = Fp8Decision(Precision.BF16, f"FP8 until step {step}: {decision.reason}")
        self.fp8_decision, self.next_fp8_look = decision, next_look(step) if everywhere else None
        level = logging.INFO if everywhere else logging.WARNING
        log.log(level, "frozen weights are multiplied in %s: %s", decision.precision, decision.reason)

    def _try_fp8(self, step: int, measure: Callable[[], Measured]) -> Fp8Decision:
        """This rank's own decision; the layers compute in FP8 afterwards, as far as it takes their weights."""
        assert self.layers is not None
        self.layers.use_compute_dtype()
        exact = measure()

        share = self.layers.use_fp8()
        if not share:
            return Fp8Decision(Precision.BF16, NO_WEIGHTS)
        if share < 1 and not step:
            log.warning(
                "%.0f%% of the layers' weights stay in 16 bits: FP8 does not take their sizes", 100 * (1 - share)
            )
        return decide(step, exact, measure())

    def memory_use(self) -> MemoryUse | None:
        """The memory plan and its measured peak, for the status; None without a plan."""
        if self.plan is None:
            return None
        return MemoryUse(
            mode=self.plan.mode,
            predicted_peak_bytes=self.plan.peak_bytes,
            measured_peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            micro_batch=self.batch.size,
            streamed_layers=len(self.streamed or ()) or None,
            fallbacks=tuple(self.fallbacks),
        )


def describe_plan(plan: MemoryPlan) -> str:
    """The plan as a table for the log."""
    return "\n".join(f"  {name:<30} {value}" for name, value in plan.rows())


def prepare_engine(model: Any, loaded: LoadedModel, config: RunConfig, world: World = ALONE) -> Engine:
    """Chooses the engine of a run, puts its kernels into `model`, a peft model, and finds how to keep documents apart.

    `world`: the processes that train together, which all make the same choices. Raises TrainerError
    (UnsupportedArchitecture) for a model that cannot be trained.
    """
    engine = _choose_engine(model, loaded, config, world)
    bring_back(loaded.model, loaded.device)  # this machine's own speeds may give another plan than before loading
    engine.window, engine.streamed = loaded.window, loaded.streamed
    if engine.plan is not None:
        loaded.streamed.stream(engine.plan.streamed_layers)
    if config.graphs and engine.layers is not None and engine.can_step_down and not (engine.window or loaded.streamed):
        record_passes(engine.layers, loaded.device)
    engine.loss_scale = LossScale() if loaded.precision is Precision.FP16 else None
    engine.use_batching(choose_batching(model, loaded))
    try_step(model, loaded, engine.loss, engine.batching.kind)
    return engine


def _choose_engine(model: Any, loaded: LoadedModel, config: RunConfig, world: World) -> Engine:
    on_gpu = loaded.device.type == "cuda"
    if not (on_gpu and loaded.precision is not Precision.FP32 and config.kernels):
        log.info("engine: plain PyTorch%s", ", activations recomputed" if on_gpu else "")
        batch = written_micro_batch(config.training) or default_micro_batch(config.training.sequences_per_step())
        return Engine(on_gpu, supervised_loss, batch, fp8_decision=_refuse_fp8(config, "the kernels are switched off"))

    loss = fused_supervised_loss if has_plain_head(model) else supervised_loss
    if loss is supervised_loss:
        log.warning("%s trains with the plain head: all supervised logits are in memory at once", loaded.architecture)

    causal = causal_model(model)
    if cost := cost_of_missing(causal.config.get_text_config(), family_of(causal)):
        log.warning("%s", cost)

    room = Room.measured(loaded, config, world)
    shape = loaded_shape(model, loaded, double_quantized=config.model.double_quantization)
    reason = why_not_fused(causal)
    if reason is None:
        room = calibrated(room, loaded.device, world, loaded.dtype, fp8=multiplies_fp8(loaded, config))
        return _fused_engine(model, loaded.dtype, config, loss, room, shape)

    log.warning("layers run module by module (%s): expect two thirds of the speed", reason)
    engine = _modular_engine(model, config, loss, room, shape)
    engine.fp8_decision = _refuse_fp8(config, f"layers run module by module ({reason})")
    return engine


def _refuse_fp8(config: RunConfig, reason: str) -> Fp8Decision | None:
    """Returns BF16 with the reason if the job asks for FP8, which needs fused layers; else None."""
    return Fp8Decision(Precision.BF16, reason) if config.training.precision is Precision.FP8 else None


def _modular_engine(model: Any, config: RunConfig, loss: Loss, room: Room, shape: ModelShape) -> Engine:
    """Engine that replaces single modules with their kernels, under autograd."""
    length = config.model.max_sequence_length

    def plan(tokens: int) -> tuple[bool, bool]:
        if config.training.memory is not MemoryMode.FASTEST:
            return False, False
        return plan_unfused_layers(shape, tokens, base_bytes=room.base, total_bytes=room.total, length=length)

    sequences = config.training.sequences_per_step()
    batch = written_micro_batch(config.training) or largest_without_recompute(
        sequences, length, lambda tokens: plan(tokens)[0]
    )
    saves_activations, keep_dequantized = plan(batch.size * length)

    causal = causal_model(model)
    if config.training.memory is MemoryMode.SMALLEST and 0 < shape.movable_bytes <= room.host:
        move_to_host(causal)
        log.info("embedding and head work from host memory")

    log.info("%s", patch_model(model, keep_dequantized=keep_dequantized))
    reason = use_packed_attention(causal)
    log.info("attention: %s", f"unchanged ({reason})" if reason else "packed sequences of variable length")
    return Engine(not saves_activations, loss, batch)


def _fused_engine(
    model: Any, dtype: torch.dtype, config: RunConfig, loss: Loss, room: Room, shape: ModelShape
) -> Engine:
    """Engine that computes each layer in one function, in `dtype`, by a memory plan."""
    causal, length, wanted = causal_model(model), config.model.max_sequence_length, config.training.memory
    machine = Machine(room.host, room.rates, room.streamed_layers)

    def plan_for(tokens: int, mode: MemoryMode, most: int = UNLIMITED) -> MemoryPlan:
        total = min(room.total, most)
        return plan_memory(shape, tokens, base_bytes=room.base, total_bytes=total, mode=mode, machine=machine)

    sequences = config.training.sequences_per_step()
    written = written_micro_batch(config.training)
    batch = written or choose_micro_batch(shape, sequences, length, wanted, lambda tokens: plan_for(tokens, wanted))
    plan = plan_for(batch.size * length, wanted)
    log.info(
        "a step is %d passes of %d sequences; memory plan\n%s", batch.accumulation, batch.size, describe_plan(plan)
    )

    layers = FusedLayers(causal, plan.policies, dtype, keep_dequantized=plan.keep_dequantized)
    layers.keep_weights(plan.kept_layers)
    use_packed_attention(causal, fused=True)  # or transformers would make a mask of [T, T]
    if plan.host_bytes:
        layers.move_vocabulary()

    # Sampling answers to prompts runs the modules themselves, not the fused layers.
    patched = patch_model(model, keep_dequantized=False)
    log.info("%d layers are fused; for samples, %s", len(layers.layers), patched)

    replan = partial(plan_for, batch.size * length)
    if shape.gathered_bytes:
        return Engine(False, loss, batch, plan, layers, replan, fp8_decision=_refuse_fp8(config, SHARDED))
    first_look = 0 if config.training.precision is Precision.FP8 else None
    return Engine(False, loss, batch, plan, layers, replan, first_look)
