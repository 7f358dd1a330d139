"""A tiny random model of every published family that GGUF files are written for, with its kind of tokenizer.

Sizes are as small as possible. Everything that distinguishes a family is as published: RoPE scaling, windows, soft
caps, tied embeddings, head sizes, special tokens.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune_test_models.tiny_families.dense import DENSE
from finetune_test_models.tiny_families.family_model import HIDDEN_SIZE, FamilyModel
from finetune_test_models.tiny_families.gemma import GEMMA
from finetune_test_models.tiny_families.mixtures import MIXTURES
from finetune_test_models.tiny_families.states import STATES
from finetune_test_models.tiny_model import write_random_weights
from finetune_test_models.tiny_tokenizers import KINDS, ByteLevelKind, write_tokenizer

FAMILY_MODELS: dict[str, FamilyModel] = DENSE | MIXTURES | STATES | GEMMA


SAMPLE = frozenset(
    {
        "llama-2", "llama-3.1", "llama-linear", "smollm", "mistral", "mistral-nemo", "qwen2.5", "qwen2.5-yarn", "qwen3",
        "gemma-2", "gemma-3", "phi-3", "phi-3-long", "phi-4", "phi-4-mini", "granite-3", "cohere-2",
    }
)  # fmt: skip
"""The models that every run of the tests converts; `make gguf` converts them all."""


def family_params(also: Sequence[str] = (), without: Sequence[str] = ()) -> list[Any]:
    """Every family but those `without`, as parameters of a test; all but the sample and `also` are marked `gguf`."""
    often = {*SAMPLE, *also}
    names = [name for name in FAMILY_MODELS if name not in without]
    return [name if name in often else pytest.param(name, marks=pytest.mark.gguf) for name in names]


def pre_tokenizer_of(name: str) -> str:
    """llama.cpp's name of the pre-tokenizer of FAMILY_MODELS[name], which its converter must be told."""
    kind = KINDS[FAMILY_MODELS[name].tokenizer]
    return kind.name if isinstance(kind, ByteLevelKind) else "default"


def make_family_model(name: str, folder: Path, texts: Sequence[str], **settings: Any) -> Path:
    """Write the model folder of FAMILY_MODELS[name]; `settings` override those of the family. Returns `folder`."""
    model = FAMILY_MODELS[name]
    count = write_tokenizer(model.tokenizer, folder, texts, chat_template=model.template)

    ids = {
        token["content"]: int(index)
        for index, token in json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"].items()
    }
    kind = KINDS[model.tokenizer]
    tokens = {
        "vocab_size": count + model.spare_rows,
        "bos_token_id": ids.get(kind.bos or ""),
        "eos_token_id": ids[kind.eos],
        "pad_token_id": ids.get(kind.pad or ""),
    }

    if model.settings.get("hidden_size_per_layer_input"):
        tokens["vocab_size_per_layer_input"] = tokens["vocab_size"]

    common = {"num_hidden_layers": 2, "hidden_size": HIDDEN_SIZE}  # K-quants need rows of a multiple of 256
    all_settings = common | tokens | dict(model.settings) | settings
    write_random_weights(folder, family=model.family, seed=model.seed, **all_settings)
    _write_as_published(folder / "config.json", model.published)

    generation = {"eos_token_id": [ids[text] for text in model.ends] or tokens["eos_token_id"]}
    if tokens["bos_token_id"] is not None:
        generation["bos_token_id"] = tokens["bos_token_id"]
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


def _write_as_published(path: Path, published: Mapping[str, Any]) -> None:
    """Write the settings into config.json at `path`, and leave out those that are None."""
    config = json.loads(path.read_text()) | published
    left_out = {key for key, value in published.items() if value is None}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in left_out}))
