"""The `general.*` metadata: name, size, licence, languages, ancestors, and the sampling that the model's makers advise.

The `gguf` package turns a model card and generation_config.json into metadata, for us as for llama.cpp's converter.
Others write both files, so only fields of the right form are passed on. The converter also guesses from the folder's
name; ours are temporary, so that is left out.

A model that was trained here is not the base. Of the base's card it inherits licence, languages and tags, and its base
model is the base.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from gguf import Metadata
from gguf.utility import size_label

from finetune_api.base import Json
from finetune_trainer.sources.front_matter import CARD, MAX_CARD_BYTES, find_front_matter

log = logging.getLogger(__name__)
# Aliases of YAML repeat a text for four bytes each: nothing is passed on that is longer than people write.
MAX_TEXT, MAX_ENTRIES = 4096, 1024
INHERITED = ("license", "license_name", "license_link", "language", "languages", "tags", "pipeline_tag")
ANCESTORS = ("base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources")
SAMPLING: dict[str, tuple[type[int] | type[float], tuple[str, ...]]] = {
    "sampling_top_k": (int, ("top_k",)),
    "sampling_top_p": (float, ("top_p",)),
    "sampling_min_p": (float, ("min_p",)),
    "sampling_xtc_probability": (float, ("xtc_probability",)),
    "sampling_xtc_threshold": (float, ("xtc_threshold",)),
    "sampling_temp": (float, ("temperature",)),
    "sampling_penalty_last_n": (int, ("penalty_last_n",)),
    "sampling_penalty_repeat": (float, ("penalty_repeat", "repetition_penalty")),
    "sampling_mirostat": (int, ("mirostat",)),
    "sampling_mirostat_tau": (float, ("mirostat_tau",)),
    "sampling_mirostat_eta": (float, ("mirostat_eta",)),
}
"""Attribute of Metadata -> its type, and its names in generation_config.json, of which the first one present counts."""
MAX_NUMBER = 1 << 31


@dataclass(frozen=True)
class Origin:
    """The name and the ancestry of the model in a GGUF file."""

    name: str
    """general.name."""
    base_name: str | None
    """The base on the Hugging Face Hub: org/name; None if it does not come from there."""
    is_trained: bool
    """True if an adapter is merged into the base."""


@dataclass(frozen=True)
class Size:
    """The number of a model's weights, for its size label."""

    shared: int
    """Weights that every token sees."""
    expert: int = 0
    """Weights of one expert, in all layers together."""
    experts: int = 0
    """Experts a layer; 0: the model has none."""

    @property
    def label(self) -> str:
        """The label: 8B, or 8x7B."""
        return size_label(self.shared, self.shared, self.expert, self.experts)


def read_metadata(folder: Path, origin: Origin, generation: Mapping[str, Any], size: Size) -> Metadata:
    """Read the base's card in `folder`; returns what `general.*` says. `generation` is generation_config.json."""
    card = _read_card(folder)
    if origin.is_trained:
        card = {key: value for key, value in card.items() if key in INHERITED}
        card |= {"base_model": origin.base_name} if origin.base_name else {}

    metadata = Metadata.apply_metadata_heuristic(Metadata(name=origin.name), card, None, None, size.shared)
    metadata.size_label = size.label

    for attribute, (kind, keys) in SAMPLING.items():
        given = next((generation[key] for key in keys if generation.get(key) is not None), None)
        if _is_number(given):
            setattr(metadata, attribute, kind(given))
    return metadata


def _is_number(value: object) -> TypeGuard[float]:
    """True for numbers that fit GGUF's 32 bits; False for NaN, which compares with nothing."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def _read_card(folder: Path) -> Json:
    """The fields of the model card whose form GGUF can hold; empty if there is no card or it cannot be read."""
    path = folder / CARD
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return {}

    block = find_front_matter(path.read_text(encoding="utf-8", errors="replace"))
    try:
        # Every scalar stays the text that was written: `no` is Norwegian, and 1.10 a version.
        fields = yaml.load((block or "").replace("\t", "  "), Loader=yaml.BaseLoader)  # noqa: S506  # texts only
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        log.warning("the block at the top of %s is not valid YAML, so GGUF files name no licence: %s", path, error)
        return {}

    if not isinstance(fields, dict):
        return {}
    usable = {key: _usable(value, key in ANCESTORS) for key, value in fields.items() if isinstance(key, str)}
    return {key: value for key, value in usable.items() if value}


def _usable(value: object, may_describe: bool) -> Any:
    """A text, or a list of texts; with `may_describe` also of descriptions. None for everything else."""
    if isinstance(value, list):
        entries = (_described(entry) if may_describe and isinstance(entry, dict) else _text(entry) for entry in value)
        return [entry for entry in list(entries)[:MAX_ENTRIES] if entry]
    return _text(value)


def _described(entry: dict[Any, Any]) -> dict[str, str]:
    return {key: text for key, value in entry.items() if isinstance(key, str) and (text := _text(value))}


def _text(value: object) -> str | None:
    is_usable = isinstance(value, str) and len(value) <= MAX_TEXT and value not in ("", "~", "null", "Null", "NULL")
    return str(value) if is_usable else None
