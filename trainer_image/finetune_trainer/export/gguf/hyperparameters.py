"""The architecture part of a GGUF file's metadata, from the Hugging Face config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFType, GGUFWriter
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from finetune_trainer.export.base_model.folder import load_json
from finetune_trainer.export.base_model.language_model import has_language_model, language_model_config
from finetune_trainer.export.errors import UnsupportedArchitectureError
from finetune_trainer.export.gguf.families import GgufFamily
from finetune_trainer.export.gguf.rope import add_rope_metadata, rotated_dimensions

GGUF_QUANTIZATION_VERSION = 2


def load_full_config(folder: Path) -> dict[str, Any]:
    """config.json with every default filled in and RoPE settings in one form, by transformers' own config classes.

    Files in the wild leave out what equals a default of their time; only those classes know the defaults. Of a
    checkpoint that reads images, too, it is the language model's.
    """
    written = load_json(folder / "config.json")
    if has_language_model(written):
        return language_model_config(folder, written)
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except (ValueError, OSError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UnsupportedArchitectureError(f"cannot read {folder / 'config.json'}: {error}") from error
    return config


def load_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json as it is; empty where there is none."""
    path = folder / "generation_config.json"
    return load_json(path) if path.is_file() else {}


def add_hyperparameters(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Write what kind of file it is, and the architecture's keys."""
    writer.add_type(GGUFType.MODEL)
    writer.add_quantization_version(GGUF_QUANTIZATION_VERSION)

    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if family.rope_dimensions:
        writer.add_rope_dimension_count(rotated_dimensions(config))
    add_rope_metadata(writer, family, config)
    _add_attention_settings(writer, family, config)


def _add_attention_settings(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    if family.sliding_window:
        writer.add_sliding_window(config.get("sliding_window") or 0)  # 0 is llama.cpp's word for none
    windowed_rope = config["rope_parameters"].get("sliding_attention")
    if windowed_rope is not None:
        writer.add_rope_freq_base_swa(float(windowed_rope["rope_theta"]))
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
