"""Sizes that differ between full and windowed layers, as metadata: Gemma 4's. Needs no PyTorch.

Full layers have heads of their own size, and possibly another number of heads of keys and values. The last layers may
have no keys and values at all, but those of an earlier layer, and then MLPs of twice the width. Small models add an
embedding of each token to every layer.
"""

from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter

from finetune_trainer.export.errors import UnsupportedArchitectureError

FULL, WINDOWED = "full_attention", "sliding_attention"
ROPE = {FULL: "proportional", WINDOWED: "default"}
"""The RoPE of each kind of layers."""
HEAD, KV_HEADS = "head_dim", "num_key_value_heads"


def full_layer_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that full layers have of their own."""
    first = next((str(index) for index, kind in enumerate(config["layer_types"]) if kind == FULL), "")
    own: Mapping[str, Any] = (config.get("per_layer_config") or {}).get(first, {})
    return own


def full_head_size(config: Mapping[str, Any]) -> int:
    """Dimensions of a head of full layers."""
    return int(full_layer_settings(config).get(HEAD) or config[HEAD])


def add_layer_sizes(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write the sizes of heads of both kinds of layers, and which layers read others' keys and values.

    Raises UnsupportedArchitectureError for a setting that llama.cpp computes otherwise.
    """
    _check(config)
    full, windowed = full_head_size(config), int(config[HEAD])
    writer.add_key_length(full)
    writer.add_value_length(full)
    writer.add_key_length_swa(windowed)
    writer.add_value_length_swa(windowed)
    writer.add_rope_dimension_count(full)  # a tensor of divisors stops the dimensions that do not turn
    writer.add_rope_dimension_count_swa(windowed)

    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config.get("hidden_size_per_layer_input") or 0)


def kv_heads_of_layers(config: Mapping[str, Any]) -> int | list[int]:
    """Heads of keys and values; of each layer if full layers have a number of their own."""
    windowed, full = int(config[KV_HEADS]), full_layer_settings(config).get(KV_HEADS)
    if full is None:
        return windowed
    return [windowed if kind == WINDOWED else int(full) for kind in config["layer_types"]]


def mlp_width_of_layers(config: Mapping[str, Any]) -> int | list[int]:
    """Width of MLPs; of each layer if those that read others' keys and values are twice as wide."""
    width, layers = int(config["intermediate_size"]), int(config["num_hidden_layers"])
    if not config.get("use_double_wide_mlp"):
        return width
    first_shared = layers - int(config["num_kv_shared_layers"])
    return [width if index < first_shared else 2 * width for index in range(layers)]


def _check(config: Mapping[str, Any]) -> None:
    if config.get("use_bidirectional_attention") == "all":
        raise UnsupportedArchitectureError(
            "llama.cpp computes this architecture as a decoder, but config.json has use_bidirectional_attention 'all': "
            "export without GGUF"
        )

    rows, own = config["vocab_size"], config.get("vocab_size_per_layer_input")
    if config.get("hidden_size_per_layer_input") and own != rows:
        raise UnsupportedArchitectureError(
            f"llama.cpp has rows for every token in the embedding of each layer, but config.json has "
            f"vocab_size_per_layer_input {own} and vocab_size {rows}: export without GGUF"
        )

    for layers, expected in ROPE.items():
        kind = config["rope_parameters"][layers]["rope_type"]
        if kind != expected:
            raise UnsupportedArchitectureError(
                f"llama.cpp computes {expected} RoPE in the {layers} layers of this architecture, but config.json has "
                f"RoPE scaling {kind!r} there: export without GGUF"
            )
