"""Estimates the GPU memory of a mixture of experts, whose layers are fused or run module by module. Pure.

Weights and adapters are counted from the headers of the model's files; the rest is what the engine plans with.
"""

from dataclasses import replace
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode, Parallelism, Quantization
from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_kernels.planning.fused_support import largest
from finetune_kernels.planning.loaded_weights import ADAPTER_BYTES, let_stream
from finetune_kernels.planning.memory_plan import MARGIN, unfused_bytes
from finetune_kernels.planning.model_shape import ModelShape, ParameterCounts, build_shape
from finetune_kernels.planning.parts.vocabulary import keeps_vocabulary, vocabulary_bytes
from finetune_trainer.model.planned_weights import PlannedWeights
from finetune_trainer.preflight.gpu import estimate_plans, memory_remedy
from finetune_trainer.preflight.memory.fused_layers import why_not_fused
from finetune_trainer.preflight.memory.plans import Plans
from finetune_trainer.preflight.memory.speed import why_unknown
from finetune_trainer.preflight.report import Finding, GpuEstimate, PlanRow
from finetune_trainer.preflight.steps import TrainingSize
from finetune_trainer.storage.sizes import GIBIBYTE, format_size

_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


def estimate_mixture(
    config: RunConfig, model: Any, planned: PlannedWeights, size: TrainingSize | None
) -> GpuEstimate | None:
    """The estimate for `model`, transformers' configuration; None without a GPU's name, or for another model."""
    gpu, shape = config.gpu, _shape(config, model, planned)
    if gpu is None or shape is None:
        return None
    if (plans := mixture_plans(config, model, planned)) is not None:
        return estimate_plans(config, plans, Parallelism.REPLICATED, size)

    limit = config.model.max_sequence_length
    length = min(limit, size.longest_sequence) if size else limit
    rows = config.training.batch_size or 1
    moves = config.training.memory is MemoryMode.SMALLEST and shape.movable_bytes > 0
    moved = shape.movable_bytes if moves else 0
    loaded = planned.loaded_bytes - moved
    kept, smallest = (loaded + _beside(shape, rows, length, saves=saves) for saves in (True, False))
    fits = gpu.memory_bytes is None or kept <= MARGIN * gpu.memory_bytes
    saves = fits and config.training.memory is MemoryMode.FASTEST

    return GpuEstimate(
        name=gpu.name,
        gpus=max(1, config.gpus),
        memory_bytes=gpu.memory_bytes,
        mode=MemoryMode.FASTEST if saves else MemoryMode.SMALLEST if moves else MemoryMode.BALANCED,
        peak_bytes=kept if saves else smallest,
        smallest_bytes=smallest,
        plan=tuple(_rows(shape, planned, rows, length, saves=saves, moved=moved)),
        why_no_speed=why_unknown(shape, gpu.teraflops) or "the speed of mixtures without fused layers is not measured",
        price=config.price,
        watts=gpu.watts,
    )


def mixture_plans(config: RunConfig, model: Any, planned: PlannedWeights) -> Plans | None:
    """The memory plans of a mixture whose layers are fused, with their experts in host memory if need be; None for
    another model."""
    shape = _shape(config, model, planned)
    if shape is None or why_not_fused(config, model) is not None:
        return None
    shape = let_stream(shape, double_quantized=config.model.double_quantization)
    return Plans(config, shape, planned.loaded_bytes, Parallelism.REPLICATED)


def judge_mixture(
    config: RunConfig, model: Any, planned: PlannedWeights, size: TrainingSize | None, estimate: GpuEstimate | None
) -> list[Finding]:
    """An error for a mixture that cannot fit its GPU, and a warning for one that may not."""
    total = estimate.memory_bytes if estimate else None
    if estimate is None or total is None or estimate.smallest_bytes <= MARGIN * total:
        return []

    adapters = planned.adapter_parameters * (ADAPTER_BYTES + 7)
    message = (
        f"the run needs {estimate.smallest_bytes / GIBIBYTE:.1f} GiB of GPU memory with every activation recomputed, "
        f"but {estimate.name} has {total / GIBIBYTE:.1f} GiB"
    )
    ways = [f"a lower spec.adapter.expertRank (adapters and their optimiser take {format_size(adapters)})"]
    plans = mixture_plans(config, model, planned)
    if plans is not None and (memory := memory_remedy(config, plans, size, total)) is not None:
        ways.insert(0, memory)
    if config.model.quantization is Quantization.NONE:
        ways.insert(0, "spec.model.quantization: NF4, which takes a quarter of the memory for weights")
    if plans is None and config.training.memory is not MemoryMode.SMALLEST:
        ways.append("spec.training.memory: Smallest, which keeps embedding and head in host memory")
    ways += ["a lower spec.model.maxSequenceLength", "a larger GPU"]

    remedy = f"{message}; what makes it smaller: {'; '.join(ways)}"
    if estimate.smallest_bytes > total:
        return [Finding.error("spec.training.batchSize", remedy, FailureReason.CUDA_OUT_OF_MEMORY)]
    return [Finding.warning("spec.training.batchSize", f"memory may run out: {remedy}")]


def _shape(config: RunConfig, model: Any, planned: PlannedWeights) -> ModelShape | None:
    """The shape of a mixture that the kernels know."""
    known = expert_family_of_type(getattr(model, "model_type", None)) is not None and planned.coverage.experts > 0
    if not known or any(not isinstance(largest(model, name), int) for name in _NEEDED):
        return None

    quantized = config.model.quantization is Quantization.NF4
    counts = ParameterCounts(
        linears=planned.coverage.linears,
        adapters=planned.adapter_parameters,
        quantized=quantized,
        movable_bytes=0,
    )
    shape = build_shape(model, counts, dropout=config.adapter.dropout > 0)
    stays = keeps_vocabulary(model) or bool(config.model.new_tokens)  # rows that train stay
    return shape if stays else replace(shape, movable_bytes=vocabulary_bytes(model))


def _beside(shape: ModelShape, rows: int, length: int, *, saves: bool) -> int:
    """Bytes beside weights and adapters."""
    tokens = rows * length
    return unfused_bytes(shape, tokens, saves=saves, length=length) + shape.loss_bytes(tokens, blocked=False)


def _rows(
    shape: ModelShape, planned: PlannedWeights, rows: int, length: int, *, saves: bool, moved: int
) -> list[PlanRow]:
    adapters = planned.adapter_parameters * ADAPTER_BYTES
    optimizer = planned.adapter_parameters * 7
    beside = _beside(shape, rows, length, saves=saves)
    found = {
        "weights as loaded": planned.loaded_bytes - adapters,
        **({"embedding and head, moved to the host": -moved} if moved else {}),
        f"adapters, on experts of rank {planned.expert_rank}": adapters,
        "gradients, optimiser, copies": optimizer,
        f"activations, {'saved' if saves else 'recomputed'}, and one layer's work": beside - optimizer,
        "predicted peak": planned.loaded_bytes - moved + beside,
    }
    return [PlanRow(name=name, value=f"{count / GIBIBYTE:.2f} GiB") for name, count in found.items()]
