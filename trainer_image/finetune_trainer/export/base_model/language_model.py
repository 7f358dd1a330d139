"""The language model inside a checkpoint that reads images, too: Gemma 3 from 4B on is published so only.

Its tensors have a prefix, its configuration is a section of the whole one's (with defaults left out), and everything
else belongs to the images. Taken out, it is a model like any other of the family: it trains, merges and converts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor
from finetune_trainer.model.description import LANGUAGE_MODELS

PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def has_language_model(config: Mapping[str, Any]) -> bool:
    """Whether config.json, as written, is that of such a checkpoint."""
    architectures = config.get("architectures")
    return isinstance(architectures, list) and bool(architectures) and architectures[0] in LANGUAGE_MODELS


def language_model_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's configuration, defaults filled in; `config` is config.json as written."""
    try:
        text: dict[str, Any] = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().to_dict()
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise InvalidBaseError(f"cannot read {folder / 'config.json'}: {error}") from error
    tokens = {name: config[name] for name in TOKENS if config.get(name) is not None}
    return text | tokens | {"architectures": [LANGUAGE_MODELS[config["architectures"][0]]]}


def language_model_tensors(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """The language model's tensors by the names that it gives them alone."""
    found = []
    for tensor in tensors:
        for prefix, own in PREFIXES.items():
            if tensor.name.startswith(prefix):
                found.append(replace(tensor, name=own + tensor.name.removeprefix(prefix)))
    if not found:
        raise InvalidBaseError(f"no tensor has one of the prefixes {', '.join(PREFIXES)} of a language model")
    return found
