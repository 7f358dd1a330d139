"""What is particular about each model family in GGUF: one table, no class per family.

Source: the model code of transformers (what a weight means) and llama.cpp's graphs (what it expects). A family is
listed once a parity test against llama.cpp covers it.
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
    """How one Hugging Face `model_type` becomes a llama.cpp architecture."""

    architecture: MODEL_ARCH
    permuted_heads: bool = False
    """Rows of q and k go from RoPE's halves to interleaved pairs."""
    norm_offset: float = 0.0
    """Norm weights are stored around 0 in Hugging Face and around 1 in GGUF."""
    sliding_window: bool = False
    """Attention of some layers is windowed, and llama.cpp wants the window's size."""
    rope_dimensions: bool = False
    """llama.cpp wants the number of rotated dimensions of a head."""
    fixed_scale_layers: int | None = None
    """llama.cpp hard-codes the attention scale: 1/sqrt(head size), but 1/sqrt(hidden/heads) at this number of
    layers."""
    window_period: int | None = None
    """llama.cpp hard-codes that every n-th layer attends fully."""
    activation: str = "silu"
    """llama.cpp hard-codes what gates the MLP."""
    rope_tensors: bool = False
    """llama.cpp takes divisors of RoPE's frequencies from tensors."""
    names_longrope: bool = True
    """The kind of scaling must be named for the short and long divisors to be looked for."""
    original_context: bool = False
    """The context length before any scaling is always written."""


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


def find_family(config: Mapping[str, Any]) -> GgufFamily:
    """The family of a Hugging Face config; raises UnsupportedArchitectureError where GGUF could not be faithful."""
    model_type = config.get("model_type")
    family = GGUF_FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedArchitectureError(
            f"no GGUF conversion for model type {model_type!r}; supported are {', '.join(GGUF_FAMILIES)}"
        )
    _check_activation(family, config)
    _check_attention_scale(family, config)
    _check_windows(family, config)
    return family


def _check_activation(family: GgufFamily, config: Mapping[str, Any]) -> None:
    found = config.get("hidden_activation") or config["hidden_act"]
    if found != family.activation:
        raise UnsupportedArchitectureError(
            f"llama.cpp computes {family.activation} in this architecture, but config.json asks for {found!r}"
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
            f"but config.json asks for query_pre_attn_scalar {config['query_pre_attn_scalar']}"
        )


def _check_windows(family: GgufFamily, config: Mapping[str, Any]) -> None:
    if family.window_period is None:
        window = _largest_context(config)
        if window is not None:
            log.warning(
                "llama.cpp does not window the attention of this architecture: beyond %s tokens its answers differ "
                "from transformers'",
                window,
            )
        return
    period = family.window_period
    layers = config["layer_types"]
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(layers))]
    if layers != expected:
        raise UnsupportedArchitectureError(
            f"llama.cpp expects full attention in every {period}. layer, but config.json's layer_types are {layers}"
        )


def _largest_context(config: Mapping[str, Any]) -> int | None:
    """The window that transformers applies, where it is smaller than the context."""
    kinds: list[str] = config.get("layer_types") or []
    window = config.get("sliding_window")
    is_applied = "sliding_attention" in kinds if kinds else True
    return window if window and is_applied and window < config["max_position_embeddings"] else None
