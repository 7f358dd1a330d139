"""The language model inside a multimodal checkpoint: Gemma 3 from 4B on is published only with its vision tower.

Its tensors have a prefix, its config is a section of the whole config (with defaults left out), and everything else
belongs to the images. Extracted, it is a model like any other of its family: it trains, merges and converts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from finetune_api.base import Json
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor
from finetune_trainer.model.description import LANGUAGE_MODELS

PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
"""Prefix in the whole checkpoint -> prefix in the language model alone."""
OUTER_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
"""Keys that the outer config decides where it has them."""


def has_language_model(config: Mapping[str, Any]) -> bool:
    """True if config.json, as written, belongs to a multimodal checkpoint with a language model that is known."""
    architectures = config.get("architectures")
    return isinstance(architectures, list) and bool(architectures) and architectures[0] in LANGUAGE_MODELS


def language_model_config(folder: Path, config: Mapping[str, Any]) -> Json:
    """The language model's config with defaults filled in; `config` is config.json as written.

    Raises InvalidBaseError if transformers cannot read the config.
    """
    try:
        text: Json = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().to_dict()
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise InvalidBaseError(f"cannot read {folder / 'config.json'}: {error}") from error

    # They win over the section's defaults.
    outer = {name: config[name] for name in OUTER_KEYS if config.get(name) is not None}
    return text | outer | {"architectures": [LANGUAGE_MODELS[config["architectures"][0]]]}


def language_model_tensors(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """The language model's tensors, named as in a checkpoint of it alone."""
    found = []
    for tensor in tensors:
        for prefix, own in PREFIXES.items():
            if tensor.name.startswith(prefix):
                found.append(replace(tensor, name=own + tensor.name.removeprefix(prefix)))
    if not found:
        raise InvalidBaseError(
            f"no tensor of this multimodal checkpoint begins with {', '.join(PREFIXES)}: its language model "
            "cannot be extracted"
        )
    return found
