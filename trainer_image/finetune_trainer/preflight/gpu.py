"""Whether the run fits into its GPU, and how long it will take: the memory plan, asked before there is a GPU. Pure.

    tokens/s = EFFICIENCY x TFLOP/s / (4 P + attention + head)     P: parameters of the linears, which stay frozen;
                                                                   6 P with DoRA, whose outputs are made once more

Refused is only what cannot fit: the smallest plan needs more than the whole card. What the card holds beyond the plan's
own margin is a warning.
"""

from collections.abc import Callable
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import AdapterVariant, MemoryMode, Precision, Quantization
from finetune_kernels.planning.memory_plan import MARGIN, MemoryPlan, ModelShape, plan_memory
from finetune_kernels.planning.micro_batch import choose_micro_batch
from finetune_kernels.planning.model_shape import loaded_bytes, shape_from_config
from finetune_trainer.preflight.report import Finding, GpuEstimate, PlanRow, Severity
from finetune_trainer.preflight.steps import TrainingSize

GIBIBYTE = 1 << 30
EFFICIENCY = 0.5
"""Share of the data sheet's TFLOP/s that training reaches: 15,800 tokens/s with Llama 8B on an H200."""
BACKWARD = 2.5  # attention's products in backward, over those in forward
UNLIMITED = 1 << 50
LENGTH_STEP = 128
PLACE = "spec.training.batchSize"


def estimate_gpu(config: RunConfig, model: Any, size: TrainingSize | None) -> GpuEstimate | None:
    """The estimate for `model`, transformers' text configuration; None without a GPU, or for a model whose layers the
    plan does not know."""
    gpu = config.gpu
    plans = _Plans.of(config, model)
    if gpu is None or plans is None:
        return None
    tokens = _rows(config, plans, gpu.memory_bytes or UNLIMITED) * _longest(config, size)
    smallest = plans.smallest(tokens)
    plan = plans.at(tokens, config.training.memory, gpu.memory_bytes or UNLIMITED)
    speed = _tokens_per_second(plans.shape, plan, config.model.max_sequence_length, gpu.teraflops)
    return GpuEstimate(
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        mode=plan.mode,
        peak_bytes=plan.peak_bytes,
        smallest_bytes=smallest.peak_bytes,
        plan=tuple(
            PlanRow(name=name, value=value) for name, value in plan.rows() if gpu.memory_bytes or " of " not in value
        ),
        tokens_per_second=speed,
        hours=size.tokens / speed / 3600 if size and speed else None,
    )


def judge_gpu(config: RunConfig, model: Any, size: TrainingSize | None, estimate: GpuEstimate | None) -> list[Finding]:
    """Errors and warnings of the estimate."""
    if estimate is None:
        return []
    found = []
    total, plans = estimate.memory_bytes, _Plans.of(config, model)
    if reason := _why_more(config):
        found.append(_warning(f"layers run module by module ({reason}): expect more memory and time than estimated"))
    if total is None or plans is None:
        return found
    need, has = _gib(estimate.smallest_bytes), _gib(total)
    if estimate.smallest_bytes > total:
        ways = _remedies(config, plans, _longest(config, size), total)
        message = f"{need} of GPU memory are needed even with spec.training.memory: Smallest, {estimate.name} has {has}"
        changes = f"; what fits: {'; or '.join(ways)}" if ways else ""
        found.append(
            Finding(
                severity=Severity.ERROR,
                location=PLACE,
                message=f"{message}{changes}",
                reason=FailureReason.CUDA_OUT_OF_MEMORY,
            )
        )
    elif estimate.smallest_bytes > MARGIN * total:
        found.append(_warning(f"{need} of the {has} of {estimate.name} are needed: memory may run out"))
    return found


class _Plans:
    """Memory plans of one model."""

    def __init__(self, config: RunConfig, model: Any, shape: ModelShape) -> None:
        self.shape = shape
        self._base = loaded_bytes(model, shape, double_quantized=config.model.double_quantization)

    @classmethod
    def of(cls, config: RunConfig, model: Any) -> "_Plans | None":
        quantized = config.model.quantization is Quantization.NF4
        adapter = config.adapter
        shape = shape_from_config(
            model,
            adapter.target_modules,
            adapter.rank,
            quantized=quantized,
            dropout=adapter.dropout > 0,
            magnitudes=adapter.variant is AdapterVariant.DORA,
        )
        return cls(config, model, shape) if shape else None

    def at(self, tokens: int, mode: MemoryMode, total: int) -> MemoryPlan:
        """The plan for micro-batches of so many tokens."""
        return plan_memory(self.shape, tokens, base_bytes=self._base, total_bytes=total, mode=mode)

    def smallest(self, tokens: int, total: int = UNLIMITED) -> MemoryPlan:
        """The plan that needs least."""
        return self.at(tokens, MemoryMode.SMALLEST, total)


def _remedies(config: RunConfig, plans: _Plans, longest: int, total: int) -> list[str]:
    """Each change that makes the job fit, the gentlest first; a larger GPU where none does."""
    batch = _rows(config, plans, total)

    def most_rows() -> int | None:
        return _largest(1, batch - 1, lambda rows: plans.smallest(rows * longest, total).fits)

    def most_tokens(rows: int) -> int | None:
        pieces = (longest - 1) // LENGTH_STEP
        found = _largest(1, pieces, lambda count: plans.smallest(rows * count * LENGTH_STEP, total).fits)
        return found and found * LENGTH_STEP

    ways = []
    if rows := most_rows():
        steps = config.training.sequences_per_step()
        same = f" (with gradientAccumulation: {steps // rows} a step stays the same)" if steps % rows == 0 else ""
        ways.append(f"spec.training.batchSize: {rows}{same}")
    if length := most_tokens(batch):
        ways.append(f"spec.model.maxSequenceLength: {length}")
    elif not ways and (length := most_tokens(1)):
        ways.append(f"spec.training.batchSize: 1 and spec.model.maxSequenceLength: {length}")
    if config.model.quantization is Quantization.NONE:
        ways.append("spec.model.quantization: NF4, which takes a quarter of the memory for weights")
    needed = plans.smallest(batch * longest).peak_bytes / MARGIN
    return ways or [f"a GPU with at least {_gib(int(needed))}"]


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The largest number from `low` to `high` for which `holds`, which it does up to some number."""
    if low > high or not holds(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _rows(config: RunConfig, plans: _Plans, total: int) -> int:
    """Sequences in one pass; where they are left to the plan, what it will take."""
    training, length = config.training, config.model.max_sequence_length
    if training.batch_size is not None:
        return training.batch_size
    return choose_micro_batch(
        plans.shape,
        training.sequences_per_step(),
        length,
        training.memory,
        lambda tokens: plans.at(tokens, training.memory, total),
    ).size


def _longest(config: RunConfig, size: TrainingSize | None) -> int:
    """Tokens of the longest sequence that can occur."""
    limit = config.model.max_sequence_length
    return min(limit, size.longest_sequence) if size else limit


def _tokens_per_second(shape: ModelShape, plan: MemoryPlan, length: int, teraflops: float | None) -> float | None:
    if teraflops is None:
        return None
    attention = shape.layers * 2.0 * length * shape.heads * shape.head_size * (1 + BACKWARD)
    again = sum(shape.recomputed(policy) for policy in plan.policies)
    linears = (6.0 if shape.magnitudes else 4.0) * shape.linear_parameters
    operations = linears + attention + 4.0 * shape.hidden * shape.vocabulary + again
    return EFFICIENCY * teraflops * 1e12 / operations


def _why_more(config: RunConfig) -> str | None:
    if config.adapter.variant is AdapterVariant.DORA and config.adapter.dropout > 0:
        return "spec.adapter.variant: DoRA with spec.adapter.dropout"
    if config.training.precision in (Precision.FP16, Precision.FP32):
        return f"spec.training.precision: {config.training.precision}"
    return None


def _warning(message: str) -> Finding:
    return Finding(severity=Severity.WARNING, location=PLACE, message=message)


def _gib(count: int) -> str:
    return f"{count / GIBIBYTE:.1f} GiB"
