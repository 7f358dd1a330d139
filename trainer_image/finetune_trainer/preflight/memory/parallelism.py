"""Chooses whether each GPU keeps the whole base model or a part of it. Pure.

Sharded costs time: each layer is gathered twice a pass, and no weights are kept dequantised. So Auto shards only what
does not fit on each GPU otherwise, even by the smallest memory plan. What does not fit if it is shared out either, but
with layers that stream from host memory, is not shared: one or the other.
"""

from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import AdapterVariant, Parallelism, Precision, Quantization
from finetune_kernels.planning.parts.expert_shape import experts_a_layer
from finetune_trainer.preflight.memory.plans import Plans, max_length_of, rows_of
from finetune_trainer.preflight.report import Finding
from finetune_trainer.preflight.steps import TrainingSize

PARALLELISM = "spec.training.parallelism"


def choose_parallelism(
    config: RunConfig, model: Any, total: int | None, size: TrainingSize | None = None
) -> Parallelism:
    """Returns Replicated or Sharded for a job on GPUs of `total` bytes each, None if that is not known; `model` is
    transformers' configuration of the language model. A run of one process has nobody to share with."""
    wanted = config.training.parallelism
    if config.processes == 1 or wanted is Parallelism.REPLICATED:
        return Parallelism.REPLICATED
    if wanted is Parallelism.SHARDED:
        return Parallelism.SHARDED

    plans = Plans.of(config, model, Parallelism.REPLICATED)
    if total is None or plans is None or why_not_sharded(config, model) is not None:
        return Parallelism.REPLICATED
    whole, shared = plans.without_streaming(), Plans.of(config, model, Parallelism.SHARDED)
    tokens = rows_of(config, whole, total) * max_length_of(config, size)
    if whole.at(tokens, config.training.memory, total).fits:
        return Parallelism.REPLICATED
    streams = shared is not None and not shared.smallest(tokens, total).fits and plans.smallest(tokens, total).fits
    return Parallelism.REPLICATED if streams else Parallelism.SHARDED


def judge_parallelism(config: RunConfig, model: Any, size: TrainingSize | None) -> list[Finding]:
    """Returns an error for a job that asks for Sharded and cannot have it, and a warning if it costs FP8."""
    if config.processes == 1:
        return []

    reason = why_not_sharded(config, model)
    if config.training.parallelism is Parallelism.SHARDED and reason is not None:
        message = f"Sharded is not possible: {reason}; write Replicated or Auto"
        return [Finding.error(PARALLELISM, message, FailureReason.INVALID_CONFIGURATION)]

    total = config.gpu.memory_bytes if config.gpu else None
    is_sharded = choose_parallelism(config, model, total, size) is Parallelism.SHARDED
    if is_sharded and config.training.precision is Precision.FP8:
        message = "the base does not fit each GPU whole, so it is Sharded, and FP8 needs whole weights: BF16 is used"
        return [Finding.warning("spec.training.precision", message)]
    return []


def why_not_sharded(config: RunConfig, model: Any) -> str | None:
    """Returns why the base of this job cannot be shared out; None if it can."""
    if config.model.quantization is not Quantization.NF4:
        return "spec.model.quantization is not NF4, and only weights in NF4 are shared out"
    if config.adapter.variant is AdapterVariant.DORA:
        return "DoRA's magnitudes are computed from whole weights before the processes meet"
    if experts_a_layer(model):
        return "the experts of a mixture stay whole on each GPU"
    return None
