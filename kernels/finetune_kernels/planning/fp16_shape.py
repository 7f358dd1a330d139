"""Tells what fp16 changes in a model's sizes."""

from dataclasses import replace
from typing import Any

from finetune_kernels.planning.families import family_of_config
from finetune_kernels.planning.model_shape import BYTES, ModelShape

WIDE_BYTES = 4
"""Bytes of an element in fp32."""


def in_fp16(shape: ModelShape, config: Any) -> ModelShape:
    """Returns the shape of a model that computes in fp16: its adapters and their gradients are fp32, and so is the
    residual stream of a family that overflows."""
    family = family_of_config(config)
    is_wide = family is not None and family.overflows_fp16
    return replace(shape, gradient_bytes=WIDE_BYTES, stream_bytes=WIDE_BYTES if is_wide else BYTES)
