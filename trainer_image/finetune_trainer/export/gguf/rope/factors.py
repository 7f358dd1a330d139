"""RoPE scaling as tensors, where llama.cpp does not compute it from metadata: divisors of the frequencies.

Llama 3's scaling slows the low frequencies and blends in between; llama.cpp takes the resulting divisor of every
frequency from a tensor. Phi-3's longrope has its divisors in the config; llama.cpp picks the short or the long ones by
context size. Gemma 4 turns the first dimensions of a head only, which are not neighbours in llama.cpp: a huge divisor
stops all others.

Source: transformers' modeling_rope_utils.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from finetune_trainer.export.gguf.layers.layer_sizes import full_head_size
from finetune_trainer.export.gguf.rope.metadata import global_rope, rotated_dimensions

STOPPED = 1e30
"""A divisor after which a frequency turns nothing."""


def rope_factor_tensors(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors that scale RoPE, by GGUF name: fp32 [rotated dimensions / 2] each; empty if metadata says it all."""
    rope = global_rope(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, rotated_dimensions(config))}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{span}.weight": torch.tensor(rope[f"{span}_factor"], dtype=torch.float32)
            for span in ("long", "short")
        }
    if rope["rope_type"] == "proportional":
        return {"rope_freqs.weight": _proportional_factors(rope, full_head_size(config))}
    return {}


def _proportional_factors(rope: Mapping[str, Any], size: int) -> torch.Tensor:
    """Divisor of each frequency of a head of `size` dimensions: 1 for the share that turns, else STOPPED."""
    turning = int(size * float(rope.get("partial_rotary_factor", 1.0)) / 2)
    return torch.tensor([1.0] * turning + [STOPPED] * (size // 2 - turning))


def _llama3_factors(rope: Mapping[str, Any], dimensions: int) -> torch.Tensor:
    """Divisor of each frequency: 1 for short waves, `factor` for long ones, a smooth blend between."""
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = int(rope["original_max_position_embeddings"])  # tokens

    exponents = torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions  # [dimensions / 2]
    frequencies = 1.0 / (float(rope["rope_theta"]) ** exponents)
    wavelengths = 2 * math.pi / frequencies  # tokens

    smooth = (context / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    # Waves longer than context / low are slowed by the whole factor, waves shorter than context / high by none.
    factors = torch.where(wavelengths > context / low, torch.full_like(blended, factor), blended)
    return torch.where(wavelengths < context / high, torch.ones_like(factors), factors)
