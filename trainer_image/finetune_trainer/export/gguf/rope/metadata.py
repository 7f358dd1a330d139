"""RoPE as metadata: base frequency, dimensions and scaling, where llama.cpp computes it itself. Needs no PyTorch.

Source: transformers' modeling_rope_utils.py, and the RoPE of llama.cpp's ggml (YaRN: arXiv 2309.00071).
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter, RopeScalingType

from finetune_trainer.export.errors import UnsupportedArchitectureError
from finetune_trainer.export.gguf.family_row import GgufFamily

log = logging.getLogger(__name__)
YARN_BETAS = (32.0, 1.0)
"""Beginning and end of YaRN's ramp; llama.cpp reads no other values for the families here."""

LATENT_YARN = 0.1
"""llama.cpp wants the weight on YaRN's logarithm multiplied by this, in DeepSeek's architecture only."""
NO_ROPE = {"rope_type": "default"}
"""Stands for the parameters of a family without RoPE."""
ROPE_SECTIONS = (11, 11, 10)
"""Sections of Qwen3.5 where config.json has none."""


def global_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The RoPE parameters of full-attention layers (Gemma 3 has a second set for its windowed layers)."""
    rope: Mapping[str, Any] = config.get("rope_parameters") or NO_ROPE
    full: Mapping[str, Any] = rope.get("full_attention", rope)
    return full


def rotated_dimensions(config: Mapping[str, Any]) -> int:
    """Number of dimensions of a head that are rotated."""
    return int(head_size(config) * global_rope(config).get("partial_rotary_factor", 1.0))


def head_size(config: Mapping[str, Any]) -> int:
    """Dimensions of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_rope_metadata(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Write base frequency and scaling.

    Raises UnsupportedArchitectureError for a scaling that llama.cpp does not compute.
    """
    if not config.get("rope_parameters"):
        return

    rope = global_rope(config)
    kind = rope["rope_type"]
    _check_scaled(rope, family)
    if not family.scaled_rope:
        _check_unscaled(kind)
        writer.add_rope_scaling_type(RopeScalingType.NONE)

    is_stretched = bool(family.stretched_rope and kind == "dynamic" and rope.get("alpha"))
    writer.add_rope_freq_base(_stretched_base(config) if is_stretched else float(rope["rope_theta"]))
    if family.rope_sections:
        sections = rope.get("mrope_section") or ROPE_SECTIONS
        writer.add_rope_dimension_sections([*sections, *[0] * (4 - len(sections))])

    if is_stretched:
        writer.add_rope_scaling_type(RopeScalingType.NONE)
    else:
        _add_scaling(writer, family, config)
    if kind in ("yarn", "longrope") or family.original_context:
        writer.add_rope_scaling_orig_ctx_len(_original_context(config))


def _add_scaling(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    rope = global_rope(config)
    match rope["rope_type"]:
        case "default" | "llama3" | "proportional":
            pass
        case "dynamic":
            log.warning(
                "llama.cpp does not slow RoPE by the length of a text: beyond %s tokens its answers differ from those "
                "of transformers",
                config["max_position_embeddings"],
            )
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        case "yarn":
            _add_yarn(writer, family, rope)
        case "longrope":
            if family.names_longrope:
                writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
            # The divisors themselves are tensors; see rope_factor_tensors.
            writer.add_rope_scaling_attn_factors(_longrope_attention_factor(config))
        case other:
            raise UnsupportedArchitectureError(
                f"config.json has RoPE scaling {other!r}, but GGUF export knows only default, dynamic, linear, llama3, "
                "yarn, longrope and proportional: export without GGUF"
            )


def _stretched_base(config: Mapping[str, Any]) -> float:
    """The base frequency whose slowest wave is `alpha` times as long, and whose fastest one is as it was."""
    rope, dimensions = global_rope(config), rotated_dimensions(config)
    return float(rope["rope_theta"] * rope["alpha"] ** (dimensions / (dimensions - 2)))


def _check_unscaled(kind: str) -> None:
    if kind != "default":
        raise UnsupportedArchitectureError(
            f"llama.cpp does not scale RoPE in this architecture, but config.json has RoPE scaling {kind!r}: export "
            "without GGUF"
        )


def _check_scaled(rope: Mapping[str, Any], family: GgufFamily) -> None:
    """Raise for divisors that this architecture has no tensor for, and for proportional RoPE that is slowed, too."""
    kind = rope["rope_type"]
    if kind in ("llama3", "longrope", "proportional") and not family.rope_tensors:
        raise UnsupportedArchitectureError(
            f"llama.cpp has no RoPE scaling {kind!r} for this architecture: export without GGUF"
        )
    if kind == "proportional" and float(rope.get("factor") or 1.0) != 1.0:
        raise UnsupportedArchitectureError(
            f"llama.cpp does not slow the proportional RoPE of this architecture, but config.json has the factor "
            f"{rope['factor']}: export without GGUF"
        )


def _add_yarn(writer: GGUFWriter, family: GgufFamily, rope: Mapping[str, Any]) -> None:
    """Write YaRN's factor and, if it is not the usual one, how much attention is sharpened."""
    betas = tuple(
        float(rope.get(key) or usual) for key, usual in zip(("beta_fast", "beta_slow"), YARN_BETAS, strict=True)
    )
    if betas != YARN_BETAS or (family.cut_ramp and rope.get("truncate") is False):
        raise UnsupportedArchitectureError(
            f"llama.cpp computes YaRN with beta_fast {YARN_BETAS[0]:g}, beta_slow {YARN_BETAS[1]:g} and a truncated "
            f"range, but config.json asks for {dict(rope)}: export without GGUF"
        )

    if family.latent_heads and rope.get("mscale_all_dim"):
        raise UnsupportedArchitectureError(
            f"llama.cpp does not scale this architecture's attention with YaRN, but config.json has mscale_all_dim "
            f"{rope['mscale_all_dim']} in rope_parameters: export without GGUF"
        )

    if rope.get("truncate") is False:
        log.warning(
            "llama.cpp rounds the range of frequencies that YaRN blends to whole dimensions, and this model does not: "
            "llama.cpp's answers differ a little from those of transformers"
        )

    factor = float(rope["factor"])
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    if rope.get("beta_fast") is not None:
        writer.add_rope_scaling_yarn_beta_fast(float(rope["beta_fast"]))
    if rope.get("beta_slow") is not None:
        writer.add_rope_scaling_yarn_beta_slow(float(rope["beta_slow"]))
    if family.latent_attention:
        writer.add_rope_scaling_yarn_log_mul(LATENT_YARN * _latent_yarn_weight(rope))
        return
    if family.yarn_log is not None:
        writer.add_rope_scaling_yarn_log_mul(float(rope.get(family.yarn_log) or 0.0))
        return

    usual = _yarn_scale(factor)
    given = _yarn_attention_factor(rope, factor)
    if given != usual:
        writer.add_rope_scaling_attn_factors(given / usual)  # llama.cpp multiplies by the usual one itself


def _latent_yarn_weight(rope: Mapping[str, Any]) -> float:
    """The weight with which YaRN sharpens latent attention as a whole.

    transformers has another one for the rotated dimensions alone, which llama.cpp takes to be the same.
    """
    weights = rope.get("mscale"), rope.get("mscale_all_dim")
    if not weights[0] or weights[0] != weights[1] or rope.get("attention_factor") is not None:
        raise UnsupportedArchitectureError(
            f"llama.cpp computes the YaRN of this architecture with mscale and mscale_all_dim alike and no "
            f"attention_factor, but config.json asks for {dict(rope)}: export without GGUF"
        )
    return float(weights[0])


def _yarn_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's usual attention factor, 0.1 ln(factor) + 1, with a weight on the logarithm."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """Factor that sharpens attention: as given, or the usual one, or the ratio of two usual ones with weights."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _yarn_scale(factor, rope["mscale"]) / _yarn_scale(factor, rope["mscale_all_dim"])
    return _yarn_scale(factor)


def _original_context(config: Mapping[str, Any]) -> int:
    """Context length of the model before scaling, in tokens."""
    key = "original_max_position_embeddings"
    return int(global_rope(config).get(key) or config.get(key) or config["max_position_embeddings"])


def _longrope_attention_factor(config: Mapping[str, Any]) -> float:
    """Factor that sharpens attention for the longer context: sqrt(1 + ln(scale) / ln(original context))."""
    given = global_rope(config).get("attention_factor")
    if given is not None:
        return float(given)

    original = _original_context(config)  # tokens
    scale = global_rope(config).get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
