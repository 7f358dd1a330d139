"""Kinds of layers, and what else config.json says of layers that keep a state. Needs no PyTorch."""

from collections.abc import Mapping
from typing import Any


def layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """The kind of every layer; Bamba's settings have the numbers of the layers with attention."""
    named: list[str] | None = config.get("layer_types") or config.get("layers_block_type")
    if named is not None:
        return named

    attending = config.get("attn_layer_indices") or []
    return [
        "full_attention" if each in attending else "linear_attention" for each in range(config["num_hidden_layers"])
    ]


def count_groups(config: Mapping[str, Any]) -> int:
    """Groups of channels of Mamba 2, each with its own keys and queries."""
    return int(config.get("mamba_n_groups") or config["n_groups"])


def has_rope(config: Mapping[str, Any]) -> bool:
    """True if attention has RoPE: a family without a setting for it always has."""
    return bool(config.get("position_embedding_type", "rope") == "rope")
