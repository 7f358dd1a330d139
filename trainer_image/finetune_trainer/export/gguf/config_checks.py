"""Checks of config.json: that its numbers are numbers and agree with the weights, and that llama.cpp can follow it.

Others write the config. Without these checks a layer count of 10^9 or a vocabulary of 10^12 would be believed, and
memory be spent on it, before the first tensor does not fit.
"""

from collections.abc import Mapping, Sequence
from logging import getLogger
from typing import Any

from finetune_trainer.export.errors import InvalidBaseError, UnsupportedArchitectureError
from finetune_trainer.export.gguf.family_row import GgufFamily
from finetune_trainer.export.gguf.layers.experts import check_layers_without_experts
from finetune_trainer.export.gguf.layers.first_layers import check_first_layers
from finetune_trainer.export.gguf.state_layers.metadata import check_state_layers
from finetune_trainer.export.gguf.state_layers.scales import check_scales

log = getLogger(__name__)

_COUNTS = (
    "num_hidden_layers",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_MAX_COUNT = 2**31 - 1  # GGUF stores these numbers in 32 bits
Shapes = Sequence[tuple[str, tuple[int, ...]]]
"""Name and shape of every tensor of a model."""
EMBEDDING = "model.embed_tokens.weight"
DIRECT_QUERY_LAYERS = (26, 27)
"""Numbers of layers with which llama.cpp takes latent attention whose queries have no low rank (DeepSeek V2 Lite)."""


def check_sizes(config: Mapping[str, Any], shapes: Shapes | None) -> None:
    """Raise InvalidBaseError if a size in `config` is no positive number or disagrees with the tensors `shapes`.

    None: the tensors are not known.
    """
    # Where every layer has experts, there may be no width of another MLP (Qwen 3.5 MoE).
    left_out = {"intermediate_size"} - config.keys() if _is_count(config.get("moe_intermediate_size")) else set()
    needed = [key for key in _COUNTS if key not in left_out]
    wrong = [f"{key}: {config.get(key)!r}" for key in needed if not _is_count(_one_width(key, config.get(key)))]
    if wrong:
        raise InvalidBaseError(f"config.json must have a whole number from 1 to {_MAX_COUNT} for {'; '.join(wrong)}")

    if shapes is None:
        return

    embedding = dict(shapes).get(EMBEDDING)
    expected = (config["vocab_size"], config["hidden_size"])
    if embedding is not None and embedding != expected:
        raise InvalidBaseError(
            f"{EMBEDDING} has shape {embedding}, but config.json's vocab_size and hidden_size are {expected}"
        )

    if config["num_hidden_layers"] > len(shapes):
        raise InvalidBaseError(
            f"config.json says num_hidden_layers {config['num_hidden_layers']}, which are more layers than the "
            f"{len(shapes)} tensors of the weight files can make"
        )


def _one_width(key: str, value: object) -> object:
    """The width of MLPs where config.json repeats it for each layer; other values as they are."""
    is_repeated = key == "intermediate_size" and isinstance(value, list) and value[1:] == value[:-1]
    return value[0] if is_repeated and value else value  # type: ignore[index]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value <= _MAX_COUNT


def check_settings(family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedArchitectureError if a setting in the full `config` has no equal in llama.cpp."""
    _check_activation(family, config)
    _check_fixed(family, config)
    _check_same(family, config)
    _check_attention_scale(family, config)
    _check_normed_heads(family, config)
    _check_windows(family, config)
    _check_latent_queries(family, config)
    check_first_layers(family, config)
    check_state_layers(family, config)
    check_layers_without_experts(family, config)
    check_scales(family, config)


def _check_activation(family: GgufFamily, config: Mapping[str, Any]) -> None:
    found = config.get("hidden_activation") or config.get("hidden_act", family.activation)
    if found != family.activation:
        raise UnsupportedArchitectureError(
            f"llama.cpp computes {family.activation} in this architecture, but config.json asks for {found!r}: "
            "export without GGUF"
        )


def _check_fixed(family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Raise for a setting, or for layers without RoPE, that llama.cpp computes otherwise."""
    for key, value in family.fixed.items():
        found = config.get(key, value)
        # Null is as good as nothing or false, but switches off what llama.cpp always computes.
        if found != value and (found is not None or value):
            raise UnsupportedArchitectureError(
                f"llama.cpp computes this architecture {_as_if(key, value)}, but config.json has {key} "
                f"{found!r}: export without GGUF"
            )

    layers, period = config.get("no_rope_layers"), family.no_rope_period
    if layers is not None and period is not None:
        expected = [int((layer + 1) % period != 0) for layer in range(len(layers))]
        if [int(each) for each in layers] != expected:
            raise UnsupportedArchitectureError(
                f"llama.cpp leaves RoPE out of every {period}th layer of this architecture, but config.json has "
                f"no_rope_layers {layers}: export without GGUF"
            )


def _check_same(family: GgufFamily, config: Mapping[str, Any]) -> None:
    for key, other in family.same.items():
        if config[key] != config[other]:
            raise UnsupportedArchitectureError(
                f"llama.cpp takes {key} and {other} of this architecture to be equal, but config.json has "
                f"{config[key]!r} and {config[other]!r}: export without GGUF"
            )


def _as_if(key: str, value: object) -> str:
    return f"without {key}" if value in (None, False) else f"with {key} {value}"


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


def _check_latent_queries(family: GgufFamily, config: Mapping[str, Any]) -> None:
    layers = config["num_hidden_layers"]
    if family.latent_attention and config.get("q_lora_rank") is None and layers not in DIRECT_QUERY_LAYERS:
        raise UnsupportedArchitectureError(
            f"llama.cpp reads models of this architecture without q_lora_rank only if they have "
            f"{' or '.join(map(str, DIRECT_QUERY_LAYERS))} layers, but config.json has {layers}: export without GGUF"
        )


def _check_normed_heads(family: GgufFamily, config: Mapping[str, Any]) -> None:
    size, layers, found = family.normed_heads_from, config["num_hidden_layers"], bool(config.get("use_qk_norm"))
    if size is None or found == (layers >= size):
        return
    raise UnsupportedArchitectureError(
        f"llama.cpp normalises queries and keys in models of this architecture with {size} layers or more and in no "
        f"others, but config.json has {layers} layers and use_qk_norm {found}: export without GGUF"
    )


def _check_windows(family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Raise if llama.cpp's windowed layers are others than the config's; warn if llama.cpp has no windows at all."""
    layers: list[str] = config.get("layer_types") or []
    if family.windowed_layers is not None:
        _check_windowed_size(family.windowed_layers, config, has_windows="sliding_attention" in layers)
        if "sliding_attention" not in layers:
            return
    elif family.window_pattern and family.window_period is None:
        return

    if family.window_period is None:
        window = _effective_window(config)
        if window is not None:
            log.warning(
                "llama.cpp has no sliding window for this architecture: beyond %s tokens its answers differ from "
                "those of transformers",
                window,
            )
        return

    period = family.window_period
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(layers))]
    if layers != expected:
        raise UnsupportedArchitectureError(
            f"llama.cpp computes full attention in every {period}th layer of this architecture, "
            f"but config.json has layer_types {layers}: export without GGUF"
        )


def _check_windowed_size(size: int, config: Mapping[str, Any], *, has_windows: bool) -> None:
    if has_windows == (config["num_hidden_layers"] == size):
        return
    found = "windows" if has_windows else "no windows"
    raise UnsupportedArchitectureError(
        f"llama.cpp computes sliding windows in models of this architecture with {size} layers and in no others, but "
        f"config.json has {config['num_hidden_layers']} layers and {found} in layer_types: export without GGUF"
    )


def _effective_window(config: Mapping[str, Any]) -> int | None:
    """The window that transformers applies, in tokens; None if it covers the whole context."""
    kinds: list[str] = config.get("layer_types") or []
    window = config.get("sliding_window")
    is_applied = "sliding_attention" in kinds if kinds else True
    return window if window and is_applied and window < config["max_position_embeddings"] else None
