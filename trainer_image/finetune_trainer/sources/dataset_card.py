"""Subsets and splits in a dataset's README.md: `configs` with patterns of paths, read as the Hub and `datasets` read
them. Pure: text and names in, names out.

Only the front matter is read, with a YAML loader that builds plain values. A pattern can only choose among the
repository's own files.
"""

import re
from collections.abc import Iterable
from typing import Any

import yaml

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources.front_matter import find_front_matter


def choose_from_card(uri: str, card: str, names: Iterable[str], split: str, subset: str | None) -> list[str] | None:
    """Returns the files of a split in a subset; None if the card names no files.

    Without `subset`: the subset that is marked as the default, or is called "default", or is the only one. Raises
    TrainerError (DatasetNotFound).
    """
    configs = _configs(uri, card)
    if not configs:
        return None

    chosen = _choose(uri, configs, subset)
    folder = str(chosen.get("data_dir") or "").strip("/")
    patterns = _patterns(chosen.get("data_files"))
    if not patterns:
        return [name for name in names if name.startswith(f"{folder}/")] if folder else None

    wanted = patterns.get(split)
    if wanted is None:
        listed = ", ".join(sorted(patterns))
        message = f"{uri} has no split {split}; its README.md lists {listed}: change spec.dataset.split"
        raise TrainerError(FailureReason.DATASET_NOT_FOUND, message)

    expressions = [re.compile(_translate(f"{folder}/{pattern}" if folder else pattern)) for pattern in wanted]
    return [name for name in names if any(expression.fullmatch(name) for expression in expressions)]


def _configs(uri: str, card: str) -> list[dict[str, Any]]:
    block = find_front_matter(card)
    if block is None:
        return []

    try:
        described = yaml.safe_load(block)
    except (yaml.YAMLError, ValueError, RecursionError):
        message = (
            f"the README.md of {uri} begins with a block that is not valid YAML, so its list of data files is unknown"
        )
        raise TrainerError(FailureReason.DATASET_NOT_FOUND, message) from None

    configs = described.get("configs") if isinstance(described, dict) else None
    if not isinstance(configs, list):
        return []
    return [config for config in configs if isinstance(config, dict) and isinstance(config.get("config_name"), str)]


def _choose(uri: str, configs: list[dict[str, Any]], subset: str | None) -> dict[str, Any]:
    names = [config["config_name"] for config in configs]
    if subset is not None:
        found = [config for config in configs if config["config_name"] == subset]
    else:
        # The order in which the Hub and `datasets` look for a default.
        found = [config for config in configs if config.get("default") is True]
        found = found or [config for config in configs if config["config_name"] == "default"]
        found = found or (configs if len(configs) == 1 else [])

    if not found:
        problem = f"no subset {subset}" if subset is not None else "several subsets, none of which is the default"
        message = f"{uri} has {problem}: set spec.dataset.subset to one of {', '.join(names)}"
        raise TrainerError(FailureReason.DATASET_NOT_FOUND, message)
    return found[0]


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Returns {split: patterns}. The Hub accepts a pattern, a list of patterns, and {split, path} entries."""
    if isinstance(data_files, dict):
        return {str(split): _texts(paths) for split, paths in data_files.items()}
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns: dict[str, list[str]] = {}

    for entry in entries:
        if isinstance(entry, dict):
            patterns.setdefault(str(entry.get("split", "train")), []).extend(_texts(entry.get("path")))
        else:
            patterns.setdefault("train", []).extend(_texts(entry))

    return {split: paths for split, paths in patterns.items() if paths}


def _texts(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _translate(pattern: str) -> str:
    """Returns a regular expression for a pattern: ** matches across folders, * and ? do not."""
    pattern = pattern.removeprefix("./")
    # Split with a group: the separators, which are the wildcards, stay in the list.
    parts = re.split(r"(\*\*/|\*+|\?)", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(meaning.get(part, ".*" if part.startswith("**") else re.escape(part)) for part in parts)
