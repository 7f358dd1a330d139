"""Estimates the GPU memory and time that a run needs, by asking the memory plan before there is a GPU. Pure.

Only a job that cannot fit is refused: one whose smallest plan needs more than the whole GPU. A plan that fits the GPU
but not the plan's own margin is a warning.
"""

import math
from collections.abc import Callable
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.gpus import BF16_CAPABILITY, COUNT_LABEL, OLDEST_CAPABILITY
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Parallelism, Precision, Quantization
from finetune_kernels.planning.families import family_of_config
from finetune_kernels.planning.memory_plan import MARGIN
from finetune_kernels.planning.parts.mixer_shape import cost_of_missing
from finetune_kernels.planning.rates import UNLIMITED
from finetune_trainer.distributed.driver import CudaNeed, describe_need, describe_old_card
from finetune_trainer.job.machine import HOST_MARGIN, PROCESS_BYTES, host_room
from finetune_trainer.preflight.memory.fused_layers import why_not_fused
from finetune_trainer.preflight.memory.parallelism import choose_parallelism, judge_parallelism
from finetune_trainer.preflight.memory.plans import Plans, max_length_of, rows_of
from finetune_trainer.preflight.memory.speed import tokens_per_second, why_unknown
from finetune_trainer.preflight.report import Finding, GpuEstimate, PlanRow
from finetune_trainer.preflight.steps import TrainingSize
from finetune_trainer.storage.sizes import GIBIBYTE

LENGTH_STEP = 128
BATCH_SIZE = "spec.training.batchSize"
GPUS = "spec.resources.gpus"
MEMORY = "spec.resources.memory"


def estimate_gpu(config: RunConfig, model: Any, size: TrainingSize | None) -> GpuEstimate | None:
    """The estimate for `model`, transformers' configuration of the language model.

    None if the job names no GPU, or if the plan does not know the model's layers.
    """
    gpu = config.gpu
    if gpu is None:
        return None
    parallelism = choose_parallelism(config, model, gpu.memory_bytes, size)
    plans = Plans.of(config, model, parallelism)
    if plans is None:
        return None

    return estimate_plans(config, plans, parallelism, size)


def estimate_plans(
    config: RunConfig, plans: Plans, parallelism: Parallelism, size: TrainingSize | None
) -> GpuEstimate | None:
    """The estimate for a model whose memory plans are known; None if the job names no GPU."""
    gpu = config.gpu
    if gpu is None:
        return None

    # Tokens of the largest micro-batch that can occur.
    tokens = rows_of(config, plans, gpu.memory_bytes or UNLIMITED) * max_length_of(config, size)
    smallest = plans.smallest(tokens)
    plan = plans.at(tokens, config.training.memory, gpu.memory_bytes or UNLIMITED)
    speed = tokens_per_second(plans.shape, plan, (tokens, config.model.max_sequence_length), gpu.teraflops)

    if speed is not None:
        speed *= config.processes  # 2.01 and 4.02 times as fast were measured with 2 and 4 H200 of one node

    return GpuEstimate(
        name=gpu.name,
        gpus=config.processes,
        parallelism=parallelism,
        memory_bytes=gpu.memory_bytes,
        mode=plan.mode,
        peak_bytes=plan.peak_bytes,
        smallest_bytes=smallest.peak_bytes,
        plan=tuple(
            PlanRow(name=name, value=value) for name, value in plan.rows() if gpu.memory_bytes or " of " not in value
        ),
        tokens_per_second=speed,
        why_no_speed=why_unknown(plans.shape, gpu.teraflops),
        hours=size.tokens / speed / 3600 if size and speed else None,
        price=config.price,
        watts=gpu.watts,
    )


def judge_gpu(config: RunConfig, model: Any, size: TrainingSize | None, estimate: GpuEstimate | None) -> list[Finding]:
    """Errors and warnings that follow from the estimate."""
    found = judge_parallelism(config, model, size)
    if config.gpu is not None and (cost := cost_of_missing(model, family_of_config(model))):
        found.append(Finding.warning("spec.model.source", cost))
    if estimate is None:
        return found

    if reason := why_not_fused(config, model):
        message = f"layers are not fused ({reason}), so the run needs more memory and time than estimated"
        found.append(Finding.warning(BATCH_SIZE, message))

    total, plans = estimate.memory_bytes, Plans.of(config, model, estimate.parallelism)
    if total is None or plans is None:
        return found

    need, has = _gib(estimate.smallest_bytes), _gib(total)
    if estimate.smallest_bytes > total:
        ways = _remedies(config, plans, max_length_of(config, size), total)
        smallest = "even with spec.training.memory: Smallest"
        message = f"the run needs {need} of GPU memory {smallest}, but {estimate.name} has {has}"
        changes = f"; any of these makes it fit: {'; or '.join(ways)}" if ways else ""
        found.append(Finding.error(BATCH_SIZE, f"{message}{changes}", FailureReason.CUDA_OUT_OF_MEMORY))
    elif estimate.smallest_bytes > MARGIN * total:
        message = f"the run needs {need} of the {has} of {estimate.name}, so memory may run out"
        found.append(Finding.warning(BATCH_SIZE, message))
    return found


def judge_count(config: RunConfig) -> list[Finding]:
    """Returns an error if a pod asks for more GPUs than a node has: it would wait for ever."""
    has = config.gpu.node_count if config.gpu else None
    if has is None or has >= config.gpus:
        return []

    message = f"{config.gpus} GPUs of one node are asked for, but nodeSelector {COUNT_LABEL} asks for nodes that have"
    return [
        Finding.error(
            GPUS, f"{message} {has}: write gpus: {has}, or select other nodes", FailureReason.INVALID_CONFIGURATION
        )
    ]


def judge_card(config: RunConfig) -> list[Finding]:
    """Returns an error if a card that the job may get is too old for the trainer, or for the compute type."""
    gpu, precision = config.gpu, config.training.precision
    if gpu is None or gpu.capability is None or gpu.capability >= BF16_CAPABILITY:
        return []

    if gpu.capability < OLDEST_CAPABILITY:
        message = describe_old_card(gpu.oldest)
        return [Finding.error("spec.resources", message, FailureReason.INVALID_CONFIGURATION)]
    if precision not in (Precision.BF16, Precision.FP8):
        return []
    message = f"{gpu.oldest} has no {precision}; write Auto or FP16, or choose a card from Ampere on"
    return [Finding.error("spec.training.precision", message, FailureReason.INVALID_CONFIGURATION)]


def judge_driver(config: RunConfig, need: CudaNeed | None) -> list[Finding]:
    """Returns an error if the node selector asks for a driver that cannot run the trainer's CUDA."""
    asked = config.gpu.driver if config.gpu else None
    if asked is None or need is None or asked >= need.driver:
        return []

    message = f"the node selector asks for nodes with NVIDIA's driver {asked}, but {describe_need(need)}"
    return [Finding.error("spec.resources.nodeSelector", message, FailureReason.DRIVER_TOO_OLD)]


def _remedies(config: RunConfig, plans: Plans, max_length: int, total: int) -> list[str]:
    """Each change that makes the job fit, the gentlest first; a larger GPU if none does."""
    batch = rows_of(config, plans, total)

    def maxrows_of() -> int | None:
        return _largest(1, batch - 1, lambda rows: plans.smallest(rows * max_length, total).fits)

    def max_tokens(rows: int) -> int | None:
        steps = (max_length - 1) // LENGTH_STEP
        found = _largest(1, steps, lambda count: plans.smallest(rows * count * LENGTH_STEP, total).fits)
        return found and found * LENGTH_STEP

    memory = _host_memory(config, plans, batch * max_length, total)
    ways = [memory] if memory else []
    if rows := maxrows_of():
        sequences = config.training.sequences_per_step()
        same = (
            f" (with gradientAccumulation: {sequences // rows} a step stays the same)" if sequences % rows == 0 else ""
        )
        ways.append(f"{BATCH_SIZE}: {rows}{same}")

    if length := max_tokens(batch):
        ways.append(f"spec.model.maxSequenceLength: {length}")
    elif not ways and (length := max_tokens(1)):
        ways.append(f"{BATCH_SIZE}: 1 and spec.model.maxSequenceLength: {length}")

    if config.model.quantization is Quantization.NONE:
        ways.append("spec.model.quantization: NF4, which takes a quarter of the memory for weights")

    needed = plans.smallest(batch * max_length).peak_bytes / MARGIN
    return ways or [f"a GPU with at least {_gib(int(needed))}"]


def memory_remedy(config: RunConfig, plans: Plans, size: TrainingSize | None, total: int) -> str | None:
    """The least host memory with which a job fits GPUs of `total` bytes, if that is what it lacks."""
    return _host_memory(config, plans, rows_of(config, plans, total) * max_length_of(config, size), total)


def _host_memory(config: RunConfig, plans: Plans, tokens: int, total: int) -> str | None:
    """The least host memory with which the job fits, if that is what it lacks."""
    processes, has = max(1, config.gpus), config.memory_bytes
    everything = plans.smallest(tokens, total, UNLIMITED)
    if has is None or not everything.fits:
        return None

    def fits(gibibytes: int) -> bool:
        room = host_room(gibibytes * GIBIBYTE, processes, PROCESS_BYTES)
        return plans.smallest(tokens, total, room).fits

    enough = math.ceil(processes * (everything.pinned_bytes / HOST_MARGIN + PROCESS_BYTES) / GIBIBYTE)
    spare = _largest(0, enough - has // GIBIBYTE, lambda less: fits(enough - less))
    if spare is None or enough - spare <= has // GIBIBYTE:
        return None
    return f"{MEMORY}: {enough - spare}Gi, for what waits in host memory while the GPU computes"


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The largest number from `low` to `high` for which `holds` is true, as it is up to some number; None if for none.

    Found by halving.
    """
    if low > high or not holds(low):
        return None

    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _gib(count: int) -> str:
    return f"{count / GIBIBYTE:.1f} GiB"
