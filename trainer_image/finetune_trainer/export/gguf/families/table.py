"""The model families that GGUF files are written for: one row each, and no class per family.

Source: the model code of transformers (what a weight means) and llama.cpp's graphs (what it expects). A family gets
its row once a parity test against llama.cpp covers it; `tests/trainer/export/gguf/test_families.py` lists what a row
lacks.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finetune_trainer.export.errors import UnsupportedArchitectureError
from finetune_trainer.export.gguf.config_checks import check_settings
from finetune_trainer.export.gguf.families.dense import DENSE
from finetune_trainer.export.gguf.families.gemma import GEMMA
from finetune_trainer.export.gguf.families.mixtures import MIXTURES
from finetune_trainer.export.gguf.families.states import STATES
from finetune_trainer.export.gguf.family_row import GgufFamily
from finetune_trainer.export.gguf.layers.experts import count_experts
from finetune_trainer.export.gguf.layers.kinds import layer_kinds

GGUF_FAMILIES: dict[str, GgufFamily] = DENSE | MIXTURES | STATES | GEMMA
"""By `model_type` of config.json."""


def find_family(config: Mapping[str, Any]) -> GgufFamily:
    """Find the family of a full config.

    Raises UnsupportedArchitectureError if there is none, or if a setting has no equal in llama.cpp.
    """
    model_type = config.get("model_type")
    family = GGUF_FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedArchitectureError(
            f"model_type {model_type!r} in config.json has no GGUF conversion: use {', '.join(GGUF_FAMILIES)}, "
            "or export without GGUF"
        )

    family = replace(family, **_differences(family, config))
    check_settings(family, config)
    return family


def _differences(family: GgufFamily, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields of the row that have other values in a model of this form."""
    form = family.state_layers in layer_kinds(config) if family.forms else True, count_experts(config) > 0
    return next((each.differences for each in family.forms if (each.has_states, each.has_experts) == form), {})


def is_read_back(config: Mapping[str, Any]) -> bool:
    """True if a GGUF file of this model can be read back as the tensors that it was made from, and so be judged.

    Apertus has numbers of its layers as metadata, where they are not read.
    """
    family = GGUF_FAMILIES.get(str(config.get("model_type")))
    return family is not None and not family.arrays
