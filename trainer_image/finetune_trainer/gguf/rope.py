"""Rotary position scaling: as metadata where llama.cpp computes it itself, as a tensor of factors where it does not.

Llama 3's scaling slows the low frequencies and blends in between; llama.cpp takes the resulting divisor of every
frequency from a tensor. Phi-3's longrope ships its divisors in the config; llama.cpp picks the short or the long ones
by context size.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType

from finetune_trainer.export.errors import UnsupportedArchitectureError


def global_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The RoPE parameters of full-attention layers (Gemma 3 has a second set for its windowed layers)."""
    rope: Mapping[str, Any] = config["rope_parameters"]
    full: Mapping[str, Any] = rope.get("full_attention", rope)
    return full


def rotated_dimensions(config: Mapping[str, Any]) -> int:
    """How many dimensions of a head are rotated."""
    return int(head_size(config) * global_rope(config).get("partial_rotary_factor", 1.0))


def head_size(config: Mapping[str, Any]) -> int:
    """Dimensions of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_rope_metadata(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write base frequency and scaling; raises UnsupportedArchitectureError on a scaling that llama.cpp has no form
    for."""
    rope = global_rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    match rope["rope_type"]:
        case "default" | "llama3":
            pass
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        case "yarn":
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(float(rope["factor"]))
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        case "longrope":
            writer.add_rope_scaling_orig_ctx_len(_original_context(config))
            writer.add_rope_scaling_attn_factors(_longrope_attention_factor(config))
        case other:
            raise UnsupportedArchitectureError(
                f"RoPE scaling {other!r} has no GGUF form here; known are default, linear, llama3, yarn and longrope"
            )


def rope_factor_tensors(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors that scale RoPE, by GGUF name: fp32 [rotated dimensions / 2] each; empty where metadata says it all."""
    rope = global_rope(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, rotated_dimensions(config))}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{span}.weight": torch.tensor(rope[f"{span}_factor"], dtype=torch.float32)
            for span in ("long", "short")
        }
    return {}


def _llama3_factors(rope: Mapping[str, Any], dimensions: int) -> torch.Tensor:
    """Divisor of each frequency: 1 for short waves, `factor` for long ones, a smooth blend between."""
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = int(rope["original_max_position_embeddings"])
    frequencies = 1.0 / (
        float(rope["rope_theta"]) ** (torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions)
    )
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths > context / low, torch.full_like(blended, factor), blended)
    return torch.where(wavelengths < context / high, torch.ones_like(factors), factors)


def _original_context(config: Mapping[str, Any]) -> int:
    return int(
        global_rope(config).get("original_max_position_embeddings") or config["original_max_position_embeddings"]
    )


def _longrope_attention_factor(config: Mapping[str, Any]) -> float:
    """How much attention is sharpened for the longer context: sqrt(1 + ln(scale) / ln(original context))."""
    given = global_rope(config).get("attention_factor")
    if given is not None:
        return float(given)
    original = _original_context(config)
    scale = config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
