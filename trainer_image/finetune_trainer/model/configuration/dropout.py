"""Dropout of the base model: rates in its configuration at which it drops a part of its own activations, or adds noise
to them, while it trains.

They are switched off, for fused layers and plain ones alike. Dropout keeps weights that train from leaning on each
other, and the base's are frozen: what its dropout would change is the input of the adapters, whose own dropout
(`spec.adapter.dropout`) is there for that. Configurations have it from the pretraining of their models: Seed-OSS,
GPT-2, OPT. docs/decisions/training.md says what others do.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

_RATE = re.compile("drop|jitter")
"""In the name of every such rate: attention_dropout, resid_pdrop, layerdrop, router_jitter_noise, moe_jitter_eps."""
_OF_OTHER_HEADS = re.compile("classifier|summary")
"""In the name of rates that a language model does not use."""
_OF_ANSWERS = {"phimoe": ("router_jitter_noise",)}
"""`model_type` -> rates that a model computes its answers with: the width of Phi-MoE's choice of experts."""


def dropout_rates(config: PreTrainedConfig) -> dict[str, float]:
    """Returns the rates that are on, by the names of their fields; those of a section have its name before them."""
    return {name: value for name, value, _, _ in _rates(config)}


def switch_off_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Sets every rate of the configuration to 0, in place, and returns it: for a model that is yet to be made."""
    for _, _, section, field in list(_rates(config)):
        if isinstance(section, dict):
            section[field] = 0.0
        else:
            setattr(section, field, 0.0)
    return config


def describe_dropout(rates: Mapping[str, float]) -> str | None:
    """Says which rates are switched off, for people; None if there are none."""
    if not rates:
        return None
    named = ", ".join(f"{name} = {rate:g}" for name, rate in rates.items())
    return f"the base model's configuration has dropout or noise of its own ({named}), which is switched off"


def _rates(section: Any, prefix: str = "") -> Iterator[tuple[str, float, Any, str]]:
    """Rates that are on: whole name, value, and the section and field where each stands."""
    kept = _OF_ANSWERS.get(getattr(section, "model_type", ""), ())
    for field, value in (section if isinstance(section, dict) else vars(section)).items():
        if isinstance(value, PreTrainedConfig) or (isinstance(value, dict) and field.endswith("_config")):
            yield from _rates(value, f"{prefix}{field}.")
        elif field not in kept and _is_rate(field, value):
            yield f"{prefix}{field}", float(value), section, field


def _is_rate(field: str, value: object) -> bool:
    """True for a rate that is on."""
    is_on = isinstance(value, int | float) and 0 < value < 1
    return is_on and _RATE.search(field) is not None and _OF_OTHER_HEADS.search(field) is None
