"""How the model computes: our kernels on a GPU in bfloat16, plain PyTorch elsewhere; what stays in memory, what not.

The choice is made once, from the model's shape and the free memory, and said in the log; where memory runs out all the
same, the next smaller plan takes over.
"""

import gc
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune_api.progress import MemoryFallback, MemoryUse
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode, Precision
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.host_vocabulary import movable_bytes
from finetune_kernels.layers.layer_builder import why_not_fused
from finetune_kernels.layers.packed_attention import use_packed_attention
from finetune_kernels.layers.patching import patch_model
from finetune_kernels.layers.supervised_loss import causal_model, fused_supervised_loss, has_plain_head
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory, plan_modules, smaller_plan
from finetune_kernels.planning.micro_batch import (
    MicroBatch,
    choose_micro_batch,
    default_micro_batch,
    largest_without_recompute,
)
from finetune_kernels.planning.model_shape import ModelShape, ParameterCounts, build_shape
from finetune_trainer.training.fp8_gate import Fp8Decision, decide_fp8
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.losses import supervised_loss

log = logging.getLogger(__name__)
NO_ROOM = "the memory plan keeps no weights, and FP8 is for weights that stay in GPU memory"
Loss = Callable[[Any, Mapping[str, Any], torch.Tensor, torch.Tensor, torch.Tensor | int | None], torch.Tensor]


@dataclass
class Engine:
    """What was chosen."""

    recompute_activations: bool
    loss: Loss
    batch: MicroBatch
    plan: MemoryPlan | None = None
    layers: FusedLayers | None = None
    replan: Callable[[MemoryMode], MemoryPlan] | None = None
    awaits_fp8_decision: bool = False
    """Whether the first batch is to be tried in 8 bits."""
    fp8_decision: Fp8Decision | None = None
    """What became of FP8, where the job asked for it."""
    fallbacks: list[MemoryFallback] = field(default_factory=list, init=False)
    """Each time that memory ran out and a smaller plan took over."""

    @property
    def can_step_down(self) -> bool:
        """Whether there is a smaller plan to go on with."""
        return self.layers is not None and self.plan is not None and self.plan.mode is not MemoryMode.SMALLEST

    def step_down(self, step: int) -> bool:
        """After memory ran out, `step` steps being finished: keep less from now on. False where nothing smaller is
        left."""
        if self.plan is None or self.layers is None or self.replan is None:
            return False
        smaller = smaller_plan(self.plan, self.replan)
        if smaller is None:
            return False
        gc.collect()  # half a pass may hang on cycles of frames
        if not smaller.keep_dequantized:
            self.layers.release_weights()
        self.layers.set_policies(smaller.policies)
        if smaller.host_bytes:
            self.layers.move_vocabulary()
        torch.cuda.empty_cache()
        if self.fp8_decision is not None and not smaller.keep_dequantized:
            self.fp8_decision = Fp8Decision(Precision.BF16, NO_ROOM)
        self.fallbacks.append(MemoryFallback(step=step, from_mode=self.plan.mode, to_mode=smaller.mode))
        self.plan = smaller
        log.warning("out of GPU memory after step %d: going on with less\n%s", step, explain(smaller))
        return True

    def decide_fp8(self, loss: Callable[[], torch.Tensor]) -> None:
        """Decide by the `loss` of the first batch, without gradients, whether products stay in 8 bits."""
        self.awaits_fp8_decision = False
        assert self.plan is not None
        assert self.layers is not None
        enough = self.plan.keep_dequantized
        self.fp8_decision = decide_fp8(self.layers, loss) if enough else Fp8Decision(Precision.BF16, NO_ROOM)
        log.info("frozen weights are multiplied in %s: %s", self.fp8_decision.precision, self.fp8_decision.reason)

    def memory_use(self) -> MemoryUse | None:
        """The plan and what became of it, for the status; None where nothing was planned layer by layer."""
        if self.plan is None:
            return None
        return MemoryUse(
            mode=self.plan.mode,
            predicted_peak_bytes=self.plan.peak_bytes,
            measured_peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            micro_batch=self.batch.size,
            fallbacks=tuple(self.fallbacks),
        )


def explain(plan: MemoryPlan) -> str:
    """The plan as a table for the log."""
    return "\n".join(f"  {name:<30} {value}" for name, value in plan.rows())


def prepare_engine(model: Any, loaded: LoadedModel, config: RunConfig) -> Engine:
    """Choose, and put the kernels into the model (a peft model)."""
    training = config.training
    written = MicroBatch(training.batch_size, training.gradient_accumulation) if training.batch_size else None
    on_gpu = loaded.device.type == "cuda"
    if not (on_gpu and loaded.precision is Precision.BF16 and config.kernels):
        log.info("engine: plain PyTorch%s", ", activations recomputed" if on_gpu else "")
        batch = written or default_micro_batch(training.sequences_per_step())
        return Engine(on_gpu, supervised_loss, batch, fp8_decision=_only_fused(config, "the kernels are switched off"))
    loss = fused_supervised_loss if has_plain_head(model) else supervised_loss
    if loss is supervised_loss:
        log.warning("%s trains with the plain head: all supervised logits are in memory at once", loaded.architecture)
    base, total = torch.cuda.memory_allocated(loaded.device), available_bytes(loaded.device)
    reason = why_not_fused(causal_model(model))
    if reason is None:
        return _fused_engine(model, config, loss, written, base, total)
    log.warning("layers run module by module (%s): expect two thirds of the speed", reason)
    engine = _modular_engine(model, config, loss, written, base, total)
    engine.fp8_decision = _only_fused(config, f"layers run module by module ({reason})")
    return engine


def _only_fused(config: RunConfig, obstacle: str) -> Fp8Decision | None:
    """Of a job that asks for FP8 where layers are not fused."""
    return Fp8Decision(Precision.BF16, obstacle) if config.training.precision is Precision.FP8 else None


def _modular_engine(
    model: Any, config: RunConfig, loss: Loss, written: MicroBatch | None, base: int, total: int
) -> Engine:
    """Each module with its kernel, under autograd."""
    shape, length = model_shape(model), config.model.max_sequence_length

    def plan(tokens: int) -> tuple[bool, bool]:
        return plan_modules(shape, tokens, base_bytes=base, total_bytes=total)

    sequences = config.training.sequences_per_step()
    batch = written or largest_without_recompute(sequences, length, lambda tokens: plan(tokens)[0])
    keep, stay = plan(batch.size * length)
    log.info("%s", patch_model(model, keep_dequantized=stay))
    reason = use_packed_attention(causal_model(model))
    log.info("attention: %s", f"as it was ({reason})" if reason else "packed, by variable lengths")
    return Engine(not keep, loss, batch)


def _fused_engine(
    model: Any, config: RunConfig, loss: Loss, written: MicroBatch | None, base: int, total: int
) -> Engine:
    """Each layer as one function, by the memory plan."""
    causal, shape = causal_model(model), model_shape(model)
    length, wanted = config.model.max_sequence_length, config.training.memory

    def plan_for(tokens: int, mode: MemoryMode) -> MemoryPlan:
        return plan_memory(shape, tokens, base_bytes=base, total_bytes=total, mode=mode)

    sequences = config.training.sequences_per_step()
    batch = written or choose_micro_batch(shape, sequences, length, wanted, lambda tokens: plan_for(tokens, wanted))
    plan = plan_for(batch.size * length, wanted)
    log.info("a step is %d passes of %d sequences; memory plan\n%s", batch.accumulation, batch.size, explain(plan))
    layers = FusedLayers(causal, plan.policies, torch.bfloat16, keep_dequantized=plan.keep_dequantized)
    use_packed_attention(causal)  # so that no mask of T x T is made
    if plan.host_bytes:
        layers.move_vocabulary()
    alone = patch_model(model, keep_dequantized=False)
    log.info(
        "%d layers as one function each; where modules run alone (answers to prompts), %s", len(layers.layers), alone
    )
    awaits_fp8 = config.training.precision is Precision.FP8
    return Engine(False, loss, batch, plan, layers, lambda mode: plan_for(batch.size * length, mode), awaits_fp8)


def available_bytes(device: torch.device) -> int:
    """Bytes that this process may use in all: what is free, and no more than the share of the card that it is given."""
    free, whole = torch.cuda.mem_get_info(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device) * whole)
    return min(free + torch.cuda.memory_reserved(device), share)


def model_shape(model: Any) -> ModelShape:
    """Sizes of a peft model."""
    causal = causal_model(model)
    config = causal.config.get_text_config()
    states = [getattr(weight, "quant_state", None) for weight in causal.model.layers.parameters()]
    frozen = [weight for weight in causal.model.layers.parameters() if not weight.requires_grad and weight.ndim == 2]
    dropouts = [part for name, part in causal.model.layers.named_modules() if "lora_dropout" in name]
    quantized = sum(math.prod(state.shape) for state in states if state is not None)
    counts = ParameterCounts(
        linears=quantized or sum(weight.numel() for weight in frozen),
        adapters=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        quantized=quantized > 0,
        movable_bytes=movable_bytes(causal),
    )
    return build_shape(
        config,
        counts,
        dropout=any(isinstance(part, torch.nn.Dropout) and part.p for part in dropouts),
        magnitudes=any(getattr(part, "lora_magnitude_vector", None) for part in causal.model.layers.modules()),
    )
