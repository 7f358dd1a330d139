"""Chooses whether each GPU keeps the whole base model or a part of it. Pure.

Sharded costs time: each layer is gathered twice a pass, and no weights are kept dequantised. So Auto shards only what
does not fit on each GPU otherwise, even by the smallest memory plan.
"""

from typing import Any

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import AdapterVariant, Parallelism, Quantization
from finetune_kernels.planning.expert_shape import has_experts
from finetune_trainer.preflight.memory.plans import Plans, max_length_of, rows_of
from finetune_trainer.preflight.steps import TrainingSize


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
    tokens = rows_of(config, plans, total) * max_length_of(config, size)
    fits = plans.at(tokens, config.training.memory, total).fits
    return Parallelism.REPLICATED if fits else Parallelism.SHARDED


def why_not_sharded(config: RunConfig, model: Any) -> str | None:
    """Returns why the base of this job cannot be shared out; None if it can."""
    if config.model.quantization is not Quantization.NF4:
        return "spec.model.quantization is not NF4, and only weights in NF4 are shared out"
    if config.adapter.variant is AdapterVariant.DORA:
        return "DoRA's magnitudes are computed from whole weights before the processes meet"
    if has_experts(model):
        return "the experts of a mixture stay whole on each GPU"
    return None
