"""Checkpoints that also read images or sound: where their language model is, in their config and in their files. Pure,
and without PyTorch: preflight asks too.

The language model trains as a model of its own, of the class that transformers has for it. Of some wrappers the text
part has no such class, but computes on text what a published family computes: the three position axes of Qwen-VL and
GLM-V are one on text. Each row of the tables was compared on text with the whole checkpoint, with random weights and
in fp32: the logits are equal, bit by bit (`tests/trainer/model/test_multimodal.py`).
"""

import copy
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_trainer.model.safetensors_header import TensorHeader

_USUAL, _OF_LLAMA4 = "model.language_model.", "language_model.model."
LANGUAGE_MODEL_AT: dict[str, str] = {
    **dict.fromkeys(
        (
            "gemma3", "gemma3n", "gemma4", "glm46v", "glm4v", "glm4v_moe", "mistral3", "qwen2_5_vl", "qwen2_vl",
            "qwen3_5", "qwen3_5_moe", "qwen3_vl",
        ),
        _USUAL,
    ),
    "llama4": _OF_LLAMA4,
}  # fmt: skip
"""`model_type` of a checkpoint -> the place of its language model in transformers' class, by which adapters name their
layers."""

PLAIN_TYPES = {
    "glm4v_moe_text": "glm4_moe",
    "glm4v_text": "glm4",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""`model_type` of a text section without a causal class of its own -> the family that computes the same on text."""
_TIES = "tie_word_embeddings"
_OUTER_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", _TIES)
"""Keys that the outer config decides where it has them."""

_PREFIXES = {_OF_LLAMA4: "model.", _USUAL: "model.", "language_model.lm_head": "lm_head", "lm_head": "lm_head"}
"""Beginning of a name in the files of a checkpoint -> that in the files of its language model alone."""
_UNPREFIXED = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
"""Beginnings in older checkpoints, Qwen2-VL's and Qwen2.5-VL's, whose language model has no prefix."""
PREFIXES = (_OF_LLAMA4, _USUAL, "model.layers.")
"""Beginnings of the names of a language model's layers, for people."""


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """True if config.json, as written, belongs to a checkpoint whose language model trains by itself."""
    return config.get("model_type") in LANGUAGE_MODEL_AT


def what_it_reads(config: Mapping[str, Any]) -> str:
    """Names what a multimodal checkpoint reads beside text, for people."""
    has_sound = isinstance(config.get("audio_config"), dict)
    return "images and sound" if has_sound and isinstance(config.get("vision_config"), dict) else "images"


def read_language_model_config(folder: Path) -> PreTrainedConfig:
    """transformers' configuration of the language model in a folder, multimodal or not.

    Raises what transformers raises.
    """
    whole: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if whole.model_type not in LANGUAGE_MODEL_AT:
        text: PreTrainedConfig = whole.get_text_config()
        return text
    return _language_model_config(whole, json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _language_model_config(whole: PreTrainedConfig, written: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of the language model alone; `written` is config.json."""
    text = copy.deepcopy(whole.get_text_config())
    if (plain := PLAIN_TYPES.get(text.model_type)) is not None:
        text = _as_plain(text, plain, whole)

    for name in _OUTER_KEYS:
        if written.get(name) is not None:
            setattr(text, name, written[name])
    if not any(_TIES in each for each in (written, written.get("text_config") or {})):
        setattr(text, _TIES, getattr(whole, _TIES, False))
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    return text


def _as_plain(text: PreTrainedConfig, model_type: str, whole: PreTrainedConfig) -> PreTrainedConfig:
    """The text section as a configuration of the family that computes the same."""
    kind = CONFIG_MAPPING[model_type]
    values = {name: value for name, value in text.to_dict().items() if name not in ("model_type", "architectures")}
    values.setdefault(_TIES, getattr(whole, _TIES, False))
    if not values.get("head_dim") and hasattr(kind(), "head_dim"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]

    # With positions of one axis, the division into axes means nothing.
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        values["rope_parameters"] = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    plain: PreTrainedConfig = kind.from_dict(values)
    return plain


def language_model_names(names: Collection[str]) -> dict[str, str]:
    """Names in the files -> names in the language model alone, for the tensors that belong to it."""
    has_prefix = any(name.startswith((_OF_LLAMA4, _USUAL)) for name in names)
    if not has_prefix:
        return {name: name for name in names if name.startswith(_UNPREFIXED)}

    found = {}
    for name in names:
        for prefix, own in _PREFIXES.items():
            if name.startswith(prefix):
                found[name] = own + name.removeprefix(prefix)
    return found


def split_headers(
    headers: Iterable[TensorHeader], config: Mapping[str, Any]
) -> tuple[list[TensorHeader], list[TensorHeader]]:
    """The tensors of the language model, under its own names, and all others; `config` is config.json as written."""
    listed = list(headers)
    if not is_multimodal(config):
        return listed, []
    names = language_model_names([header.name for header in listed])
    own = [replace(header, name=names[header.name]) for header in listed if header.name in names]
    return own, [header for header in listed if header.name not in names]


def name_in_checkpoint(model_type: str, name: str) -> str:
    """The name in transformers' class of the whole checkpoint of a name in its language model alone."""
    place = LANGUAGE_MODEL_AT[model_type]
    if name.startswith("model."):
        return place + name.removeprefix("model.")
    return place.removesuffix("model.") + name if place == _OF_LLAMA4 else name


def name_in_language_model(name: str) -> str:
    """The name in the language model alone of a name in transformers' class of a checkpoint, or of its own."""
    return next((own + name.removeprefix(prefix) for prefix, own in _PREFIXES.items() if name.startswith(prefix)), name)
