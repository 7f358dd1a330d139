"""Selection of the files of a source that are used. Pickled weights and code are never selected, so they never reach
this disk.

A model is a flat folder in Hugging Face layout. Data files follow the Hub's convention: the name of the split is a word
of the path (`data/train-00000-of-00002.parquet`), and files that name no split belong to train.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatch

from finetune_api.failures import FailureReason
from finetune_trainer.data.rows import DATA_SUFFIXES
from finetune_trainer.errors import TrainerError

MODEL_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PATTERNS = ("*.json", "*.jinja", "*.model", "merges.txt")
# Mistral repositories hold a second copy of the weights, which transformers does not read.
DUPLICATE_WEIGHTS = "consolidated*.safetensors"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# JSON files that describe a dataset, beside its rows.
DATA_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
USUAL_SPLITS = ("train", "training", "test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")
MAX_DATA_FILES = 10_000
MAX_NAME_BYTES = 255


def choose_model_files(uri: str, names: Iterable[str]) -> list[str]:
    """Returns the files that loading a model needs. Raises TrainerError (ModelNotFound, UnsafeModel)."""
    top = [name for name in names if "/" not in name]
    # Subfolders hold other formats (onnx/, original/), which a model folder does not need.
    chosen = sorted(name for name in top if _matches(name, MODEL_PATTERNS) and not fnmatch(name, DUPLICATE_WEIGHTS))
    if any(name.endswith(".safetensors") for name in chosen) and "config.json" in chosen:
        return chosen

    if any(name.endswith(PICKLED_SUFFIXES) for name in top) and "config.json" in chosen:
        message = f"{uri} has only pickled weights (.bin, .pt), which can run code when loaded; safetensors are needed"
        raise TrainerError(FailureReason.UNSAFE_MODEL, message)

    message = f"{uri} is not a model: config.json and *.safetensors are needed, but not among its {len(top)} files"
    raise TrainerError(FailureReason.MODEL_NOT_FOUND, message)


def choose_adapter_files(uri: str, names: Iterable[str]) -> list[str]:
    """Returns the files of a peft adapter, with the tokenizer that was saved beside it.

    Raises TrainerError (ModelNotFound, UnsafeModel).
    """
    top = [name for name in names if "/" not in name]
    chosen = sorted(name for name in top if name == ADAPTER_WEIGHTS or _matches(name, ADAPTER_PATTERNS))
    if ADAPTER_WEIGHTS in chosen and "adapter_config.json" in chosen:
        return chosen

    if any(name.endswith(PICKLED_SUFFIXES) for name in top) and "adapter_config.json" in chosen:
        message = f"{uri} has only pickled weights (.bin, .pt), which can run code when loaded; safetensors are needed"
        raise TrainerError(FailureReason.UNSAFE_MODEL, message)

    needed = f"adapter_config.json and {ADAPTER_WEIGHTS}"
    message = f"{uri} is not an adapter: {needed} are needed, but not among its {len(top)} files"
    raise TrainerError(FailureReason.MODEL_NOT_FOUND, message)


def choose_data_files(uri: str, names: Iterable[str], split: str | None) -> list[str]:
    """Returns the data files, only those of `split` if it is given. Raises TrainerError (DatasetNotFound)."""
    every = list(names)
    data = [name for name in every if name.endswith(DATA_SUFFIXES) and not _is_hidden_or_description(name)]
    chosen = sorted(data if split is None else _of_split(data, split))
    if 0 < len(chosen) <= MAX_DATA_FILES:
        return chosen

    kinds, of_split = ", ".join(DATA_SUFFIXES), f" of split {split}" if split else ""
    found = f"{len(chosen)} data files ({kinds}){of_split} among its {len(every)} files"
    raise TrainerError(FailureReason.DATASET_NOT_FOUND, f"{uri} has {found}; 1 to {MAX_DATA_FILES} are needed")


def check_names(names: Iterable[str]) -> None:
    """Raises TrainerError (InvalidConfiguration) for names that no disk can hold side by side: keys of a bucket may be
    longer than a file's name, and one may be a folder of another."""
    listed = set(names)
    for name in sorted(listed):
        parts = name.split("/")
        if longest := [part for part in parts if len(part.encode()) > MAX_NAME_BYTES]:
            message = f"{longest[0][:40]}... is a name of {len(longest[0].encode())} bytes, but files have at most 255"
            raise TrainerError(FailureReason.INVALID_CONFIGURATION, f"{message}: rename it")

        for depth in range(1, len(parts)):
            if (folder := "/".join(parts[:depth])) in listed:
                message = f"{folder} and {name} cannot both be files on a disk: rename or move one of them"
                raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)


def _of_split(names: list[str], split: str) -> list[str]:
    named = [name for name in names if split in _words(name)]
    if named or split != "train":
        return named

    # No file names the train split: it is then all files that name no other split.
    return [name for name in names if not _words(name) & set(USUAL_SPLITS)]


def _words(name: str) -> set[str]:
    """Returns the words of a path, and its parts as they are: the name of a split may itself contain separators."""
    return {*re.split(r"[^A-Za-z0-9]+", name), *re.split(r"[/.]|-[0-9]", name)}


def _is_hidden_or_description(name: str) -> bool:
    parts = name.split("/")
    is_cache = fnmatch(parts[-1], "cache-*.arrow")  # `datasets` leaves these beside a saved dataset
    return any(part.startswith(".") for part in parts) or parts[-1] in DATA_DESCRIPTIONS or is_cache


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not name.startswith(".") and any(fnmatch(name, pattern) for pattern in patterns)
