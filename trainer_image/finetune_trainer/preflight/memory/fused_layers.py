"""Tells why a job's layers will not be fused, which a memory plan takes for granted. Pure."""

from typing import Any

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import AdapterVariant, Precision
from finetune_kernels.planning.fused_support import why_not_described


def why_not_fused(config: RunConfig, model: Any) -> str | None:
    """The setting, or the part of the model's configuration, for which layers are not fused; None if they are."""
    if config.adapter.variant is AdapterVariant.DORA and config.adapter.dropout > 0:
        return "spec.adapter.variant: DoRA with spec.adapter.dropout"
    if config.training.precision is Precision.FP32:
        return f"spec.training.precision: {config.training.precision}"
    return why_not_described(model)
