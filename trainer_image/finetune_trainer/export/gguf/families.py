"""The model families that GGUF files are written for: one row each, and no class per family.

Source: the model code of transformers (what a weight means) and llama.cpp's graphs (what it expects). A family gets
its row once a parity test against llama.cpp covers it; `tests/trainer/export/gguf/test_families.py` lists what a row
lacks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Any

from gguf import MODEL_ARCH

from finetune_trainer.export.errors import UnsupportedArchitectureError

log = getLogger(__name__)


@dataclass(frozen=True)
class GgufFamily:
    """The differences between a Hugging Face `model_type` and its llama.cpp architecture."""

    architecture: MODEL_ARCH
    """llama.cpp's architecture, which also gives the names of the tensors."""
    permuted_heads: bool = False
    """The rows of q and k go from RoPE's halves to interleaved pairs."""
    norm_offset: float = 0.0
    """Added to norm weights: Hugging Face stores them around 0, GGUF around 1."""
    sliding_window: bool = False
    """llama.cpp wants the window's size: some layers attend within a sliding window."""
    rope_dimensions: bool = False
    """llama.cpp wants the number of rotated dimensions of a head."""
    fixed_scale_layers: int | None = None
    """Number of layers at which llama.cpp's attention scale, 1/sqrt(head size), becomes 1/sqrt(hidden/heads).

    None: llama.cpp does not hard-code the scale of this architecture.
    """
    window_period: int | None = None
    """Every n-th layer attends fully, which llama.cpp hard-codes; None: no layer has a window there."""
    activation: str = "silu"
    """The activation that gates the MLP, which llama.cpp hard-codes."""
    rope_tensors: bool = False
    """llama.cpp takes divisors of RoPE's frequencies from tensors."""
    names_longrope: bool = True
    """The scaling type must be written for llama.cpp to look for the short and long divisors."""
    original_context: bool = False
    """The context length before scaling is always written."""


GEMMA_ACTIVATION = "gelu_pytorch_tanh"
GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(MODEL_ARCH.LLAMA, permuted_heads=True, rope_dimensions=True, rope_tensors=True),
    "mistral": GgufFamily(MODEL_ARCH.LLAMA, permuted_heads=True, rope_dimensions=True, rope_tensors=True),
    "qwen2": GgufFamily(MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(MODEL_ARCH.QWEN3),
    "gemma2": GgufFamily(
        MODEL_ARCH.GEMMA2,
        norm_offset=1.0,
        sliding_window=True,
        fixed_scale_layers=46,
        window_period=2,
        activation=GEMMA_ACTIVATION,
    ),
    "gemma3_text": GgufFamily(
        MODEL_ARCH.GEMMA3,
        norm_offset=1.0,
        sliding_window=True,
        fixed_scale_layers=62,
        window_period=6,
        activation=GEMMA_ACTIVATION,
    ),
    "phi3": GgufFamily(
        MODEL_ARCH.PHI3,
        sliding_window=True,
        rope_dimensions=True,
        rope_tensors=True,
        names_longrope=False,
        original_context=True,
    ),
}
"""By `model_type` of config.json."""


def find_family(config: Mapping[str, Any]) -> GgufFamily:
    """Find the family of a full config.

    Raises UnsupportedArchitectureError if there is none, or if a setting has no equal in llama.cpp.
    """
    model_type = config.get("model_type")
    family = GGUF_FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedArchitectureError(
            f"model_type {model_type!r} in config.json has no GGUF conversion: use {', '.join(GGUF_FAMILIES)}, "
            "or export without GGUF"
        )

    _check_activation(family, config)
    _check_attention_scale(family, config)
    _check_windows(family, config)
    return family


def _check_activation(family: GgufFamily, config: Mapping[str, Any]) -> None:
    found = config.get("hidden_activation") or config["hidden_act"]
    if found != family.activation:
        raise UnsupportedArchitectureError(
            f"llama.cpp computes {family.activation} in this architecture, but config.json asks for {found!r}: "
            "export without GGUF"
        )


def _check_attention_scale(family: GgufFamily, config: Mapping[str, Any]) -> None:
    if family.fixed_scale_layers is None:
        return

    size = config["head_dim"]
    if config["num_hidden_layers"] == family.fixed_scale_layers:
        size = config["hidden_size"] // config["num_attention_heads"]
    if config["query_pre_attn_scalar"] != size:
        raise UnsupportedArchitectureError(
            f"llama.cpp scales the attention of this architecture by 1/sqrt({size}), "
            f"but config.json asks for query_pre_attn_scalar {config['query_pre_attn_scalar']}: export without GGUF"
        )


def _check_windows(family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Raise if llama.cpp's windowed layers are others than the config's; warn if llama.cpp has no windows at all."""
    if family.window_period is None:
        window = _effective_window(config)
        if window is not None:
            log.warning(
                "llama.cpp has no sliding window for this architecture: beyond %s tokens its answers differ from "
                "those of transformers",
                window,
            )
        return

    period, layers = family.window_period, config["layer_types"]
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(layers))]
    if layers != expected:
        raise UnsupportedArchitectureError(
            f"llama.cpp computes full attention in every {period}th layer of this architecture, "
            f"but config.json has layer_types {layers}: export without GGUF"
        )


def _effective_window(config: Mapping[str, Any]) -> int | None:
    """The window that transformers applies, in tokens; None if it covers the whole context."""
    kinds: list[str] = config.get("layer_types") or []
    window = config.get("sliding_window")
    is_applied = "sliding_attention" in kinds if kinds else True
    return window if window and is_applied and window < config["max_position_embeddings"] else None
