"""The table of model families: what was found of each model type by running a tiny model of it. Pure, without PyTorch.

`make architectures` runs every causal language model of transformers and writes `families.json`; preflight answers from
it, and docs/families.md shows it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finetune_api.vocabulary import Batching

LANGUAGE_MODEL = "its language model is "
"""Begins `refused` of a type that wraps a language model of another type, whose name follows."""
TABLE = Path(__file__).with_name("families.json")


@dataclass(frozen=True)
class ModelFamily:
    """One model type. Sentences are for people; None says that nothing speaks against it."""

    architecture: str
    """Class of transformers."""
    refused: str | None = None
    """Why no model of the type trains: it is no decoder, or its first step fails."""
    not_fused: str | None = None
    """Why its layers run module by module."""
    batching: Batching | None = None
    """How documents are kept apart; None if it is refused."""
    not_packed: str | None = None
    """Why documents are not packed."""
    adapted: float | None = None
    """Share of the layers' weights with an adapter, with default settings; None: unknown."""
    quantized: float | None = None
    """Share of the layers' weights in NF4, with default settings."""
    not_merged: str | None = None
    """Why default adapters cannot be merged."""
    gguf: str | None = None
    """llama.cpp's name of the architecture; None: no GGUF file is written."""


@cache
def model_families() -> Mapping[str, ModelFamily]:
    """Every row, by model type."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: family_of_row(row) for name, row in rows.items()}


def family_of_row(row: Mapping[str, object]) -> ModelFamily:
    """A row as `families.json` has it."""
    fields = dict(row)
    if fields.get("batching") is not None:
        fields["batching"] = Batching(str(fields["batching"]))
    return ModelFamily(**fields)  # type: ignore[arg-type]  # the file is written from this class


def unpacked_types() -> frozenset[str]:
    """Types whose packed documents see each other, or that do not take them."""
    packed = (None, Batching.PACKED)
    return frozenset(name for name, family in model_families().items() if family.batching not in packed)
