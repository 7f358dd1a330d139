"""The architecture part of a GGUF file's metadata, from the Hugging Face config."""

import math
from collections.abc import Mapping
from typing import Any

from gguf import GGUFType, GGUFWriter

from finetune_trainer.export.gguf.family_row import GgufFamily
from finetune_trainer.export.gguf.layers.experts import add_experts
from finetune_trainer.export.gguf.layers.first_layers import add_first_layers
from finetune_trainer.export.gguf.layers.kinds import MLP_KINDS, has_expert_layers, layer_kinds
from finetune_trainer.export.gguf.layers.layer_sizes import add_layer_sizes, mlp_width_of_layers
from finetune_trainer.export.gguf.rope.metadata import add_rope_metadata, rotated_dimensions
from finetune_trainer.export.gguf.state_layers.metadata import add_state_layers, context_length, count_kv_heads

GGUF_QUANTIZATION_VERSION = 2
RMS_EPSILONS = ("rms_norm_eps", "norm_eps")
"""Names of the epsilon of RMS norms in config.json."""
MEAN_EPSILONS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
"""Names of the epsilon of norms that subtract the mean, too."""


def add_hyperparameters(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Write the kind of file and the architecture's keys; `config` has every default filled in."""
    writer.add_type(GGUFType.MODEL)
    writer.add_quantization_version(GGUF_QUANTIZATION_VERSION)

    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(context_length(family, config))
    writer.add_embedding_length(config["hidden_size"])
    if (width := _feed_forward_length(family, config)) is not None:
        writer.add_feed_forward_length(width)
    writer.add_head_count(config["num_attention_heads"])
    # Latent attention has one key and value head, which every query head reads.
    has_one = family.latent_attention and not family.latent_heads
    writer.add_head_count_kv(1 if has_one else count_kv_heads(family, config))
    _add_epsilons(writer, family, config)
    add_experts(writer, family, config)
    writer.add_vocab_size(config["vocab_size"])

    # llama.cpp assumes hidden / heads where the head size is not written.
    if family.latent_attention:
        _add_latent_sizes(writer, family, config)
    elif family.layer_sizes:
        add_layer_sizes(writer, config)
    elif config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])

    if family.rope_dimensions:
        dimensions = config["qk_rope_head_dim"] if family.latent_attention else rotated_dimensions(config)
        writer.add_rope_dimension_count(dimensions)
    add_rope_metadata(writer, family, config)
    _add_attention_settings(writer, family, config)
    _add_settings(writer, family, config)
    add_first_layers(writer, family, config)
    add_state_layers(writer, family, config)


def _feed_forward_length(family: GgufFamily, config: Mapping[str, Any]) -> int | list[int] | None:
    """Width of MLPs outside experts, of each layer if they differ; LFM2 takes two thirds of the setting, in whole
    blocks. None for a configuration that has none, as every layer has experts."""
    if family.layer_sizes:
        return mlp_width_of_layers(config)
    if family.feed_forward not in config:
        return None

    if isinstance(config[family.feed_forward], list):
        return [int(width) for width in config[family.feed_forward]]
    width = int(config[family.feed_forward])
    if has_expert_layers(config) is not None:
        return [width if kind in MLP_KINDS else 0 for kind in layer_kinds(config)]
    if not config.get("block_auto_adjust_ff_dim"):
        return width

    width = int((config["block_ffn_dim_multiplier"] or 1) * int(2 * width / 3))
    block = int(config["block_multiple_of"])
    return -(-width // block) * block


def _add_latent_sizes(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Sizes of keys and values as they are cached, and as heads see them."""
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    if config.get("q_lora_rank") is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    if family.latent_heads:
        writer.add_key_length(config["qk_nope_head_dim"] + rotated)
        writer.add_value_length(config["v_head_dim"])
        return

    writer.add_key_length(rank + rotated)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rotated)
    writer.add_value_length_mla(config["v_head_dim"])


def _add_epsilons(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    rms_names = RMS_EPSILONS if family.rms_epsilon is None else (family.rms_epsilon,)
    for names, add in ((rms_names, writer.add_layer_norm_rms_eps), (MEAN_EPSILONS, writer.add_layer_norm_eps)):
        found = next((config[name] for name in names if config.get(name) is not None), None)
        if found is not None:
            add(found)


def _add_settings(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Write the settings that only this family has; they stand in config.json itself or among those of RoPE."""
    rope = config.get("rope_parameters") or {}
    for key, written in family.settings.items():
        value = config.get(key, rope.get(key))
        if value is not None:
            getattr(writer, f"add_{written}")(value)
    for written, names in family.products.items():
        getattr(writer, f"add_{written}")(math.prod(config[name] for name in names))
    for written, value in family.constants.items():
        getattr(writer, f"add_{written}")(value)


def _add_attention_settings(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    if family.sliding_window:
        writer.add_sliding_window(config.get("sliding_window") or 0)  # 0 means none to llama.cpp
    elif family.window_pattern and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])

    # Gemma 3's windowed layers have a RoPE frequency of their own.
    windowed_rope = (config.get("rope_parameters") or {}).get("sliding_attention")
    if windowed_rope is not None:
        writer.add_rope_freq_base_swa(float(windowed_rope["rope_theta"]))

    # Gemma 2's softcaps.
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
