"""Kinds of layers, and what else config.json says of layers that keep a state. Needs no PyTorch."""

from collections.abc import Mapping
from typing import Any

MLP, EXPERTS = "mlp", "moe"
MLP_KINDS = (MLP, EXPERTS)
"""Kinds of layers that are an MLP, or one of experts, and nothing else (Nemotron H)."""


def layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """The kind of every layer; Bamba's settings have the numbers of the layers with attention."""
    named: list[str] | None = config.get("layer_types") or config.get("layers_block_type")
    if named is not None:
        return named

    attending = config.get("attn_layer_indices") or []
    return [
        "full_attention" if each in attending else "linear_attention" for each in range(config["num_hidden_layers"])
    ]


def has_expert_layers(config: Mapping[str, Any]) -> bool | None:
    """True if some layer is one of experts; None: config.json has no layers that are an MLP and nothing else."""
    kinds = set(config.get("layers_block_type") or []) & set(MLP_KINDS)
    return EXPERTS in kinds if kinds else None


def count_groups(config: Mapping[str, Any]) -> int:
    """Groups of channels of Mamba 2, each with its own keys and queries."""
    return int(config.get("mamba_n_groups") or config["n_groups"])


def has_rope(config: Mapping[str, Any]) -> bool:
    """True if attention has RoPE: a family that has settings of RoPE, but none that switches it off, always has."""
    return config.get("position_embedding_type", "rope") == "rope" and bool(config.get("rope_parameters"))
