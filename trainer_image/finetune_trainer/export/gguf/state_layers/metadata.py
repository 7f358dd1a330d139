"""Kinds and sizes of layers that keep a state, as metadata. Needs no PyTorch."""

import logging
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter

from finetune_trainer.export.errors import UnsupportedArchitectureError
from finetune_trainer.export.gguf.family_row import GgufFamily
from finetune_trainer.export.gguf.layers.kinds import MLP_KINDS, has_rope, layer_kinds
from finetune_trainer.export.gguf.layers.layer_sizes import kv_heads_of_layers

log = logging.getLogger(__name__)
RECURRENT_LAYERS = "{arch}.attention.recurrent_layers"
SMALL_STEP = 1e-6
"""A least step of the state that changes no answer."""
ENDLESS = 2**20
"""The longest context that is written for a model without one, in tokens."""


def check_state_layers(family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedArchitectureError if llama.cpp has attention in other layers than config.json, or the gate of
    Mamba 2 before its norm where config.json has it behind."""
    if config.get("mamba_rms_norm") and config.get("mamba_norm_before_gate"):
        raise UnsupportedArchitectureError(
            "llama.cpp computes the gate of Mamba 2 before its norm, but config.json has mamba_norm_before_gate True: "
            "export without GGUF"
        )

    if set(MLP_KINDS) <= set(config.get("layers_block_type") or []):
        raise UnsupportedArchitectureError(
            "llama.cpp has experts in every MLP of this architecture or in none, but config.json has layers of both "
            f"kinds, {' and '.join(MLP_KINDS)}, in layers_block_type: export without GGUF"
        )

    if family.step_floor is not None and config[family.step_floor] > SMALL_STEP:
        log.warning(
            "llama.cpp does not raise the steps of Mamba 2 to %s %s: its answers differ a little from those of "
            "transformers",
            family.step_floor,
            config[family.step_floor],
        )

    interval = _interval(family, config)
    if interval is None:
        return

    layers = config["layer_types"]
    found = [kind != family.state_layers for kind in layers]
    if found != [(index + 1) % interval == 0 for index in range(len(layers))]:
        raise UnsupportedArchitectureError(
            f"llama.cpp computes attention in every {interval}th layer of this architecture, but config.json has "
            f"layer_types {layers}: export without GGUF"
        )


def add_state_layers(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Write which layers keep a state."""
    if family.rope_switch:
        writer.add_rope_scaling_finetuned(has_rope(config))

    interval = _interval(family, config)
    if interval is not None:
        is_state = [kind == family.state_layers for kind in config["layer_types"]]
        writer.add_array(RECURRENT_LAYERS.format(arch=writer.arch), is_state)
        writer.add_full_attention_interval(interval)


def context_length(family: GgufFamily, config: Mapping[str, Any]) -> int:
    """Tokens of the longest context; a state alone sets no end to it, nor does attention without RoPE."""
    is_endless = family.rope_switch and family.state_layers in layer_kinds(config) and not has_rope(config)
    return ENDLESS if is_endless else int(config["max_position_embeddings"])


def count_kv_heads(family: GgufFamily, config: Mapping[str, Any]) -> int | list[int]:
    """Heads of keys and values; of each layer where llama.cpp tells the kinds of layers apart by them, or where they
    differ."""
    if family.layer_sizes:
        return kv_heads_of_layers(config)

    count: int = config["num_key_value_heads"]
    if family.state_layers is None or family.attention_interval is not None:
        return count
    return [0 if kind in (family.state_layers, *MLP_KINDS) else count for kind in layer_kinds(config)]


def _interval(family: GgufFamily, config: Mapping[str, Any]) -> int | None:
    """Every n-th layer has attention; None: llama.cpp is told the kind of each."""
    if family.attention_interval is None:
        return None
    return int(config.get("full_attention_interval") or family.attention_interval)
