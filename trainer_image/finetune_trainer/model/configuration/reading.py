"""Reads transformers' configuration of a base model from its folder, with the base's own dropout switched off.

Whatever makes or plans a model that trains reads it here, so that preflight, the memory plan and every process of a
run see the same one. What is exported is read as it is published.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_trainer.model.configuration.dropout import switch_off_dropout
from finetune_trainer.model.multimodal import FIXED_SETTINGS, LANGUAGE_MODEL_AT, PLAIN_TYPES

_TIES = "tie_word_embeddings"
_OUTER_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", _TIES)
"""Keys that the outer config decides where it has them."""


def read_language_model_config(folder: Path) -> PreTrainedConfig:
    """transformers' configuration of the language model in a folder, multimodal or not, as it trains.

    Raises what transformers raises.
    """
    return switch_off_dropout(read_published_config(folder))


def read_base_config(folder: Path) -> PreTrainedConfig:
    """transformers' configuration of the whole model in a folder, as it trains. Raises what transformers raises."""
    return switch_off_dropout(_read(folder))


def read_published_config(folder: Path) -> PreTrainedConfig:
    """transformers' configuration of the language model in a folder, as it is published. Raises what transformers
    raises."""
    whole = _read(folder)
    if whole.model_type not in LANGUAGE_MODEL_AT:
        text: PreTrainedConfig = whole.get_text_config()
        return text
    return _language_model_config(whole, json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _read(folder: Path) -> PreTrainedConfig:
    whole: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return whole


def _language_model_config(whole: PreTrainedConfig, written: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of the language model alone; `written` is config.json."""
    text = copy.deepcopy(whole.get_text_config())
    if (plain := PLAIN_TYPES.get(text.model_type)) is not None:
        text = _as_plain(text, plain, whole)

    for name in _OUTER_KEYS:
        value = written.get(name)
        if value is not None and _is_in_vocabulary(name, value, text.vocab_size):
            setattr(text, name, value)
    if not any(_TIES in each for each in (written, written.get("text_config") or {})):
        setattr(text, _TIES, getattr(whole, _TIES, False))
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    return text


def _is_in_vocabulary(key: str, value: Any, rows: int) -> bool:
    """False for the id of a token that the language model does not have, such as SmolVLM's own 128002 for padding in
    the outer config of transformers before 5.22: no embedding could be made with it."""
    return key == _TIES or not isinstance(value, int) or value < rows


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
    plain: PreTrainedConfig = kind.from_dict(values | FIXED_SETTINGS.get(text.model_type, {}))
    return plain
