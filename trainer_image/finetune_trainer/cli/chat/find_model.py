"""The model that a user means by a path: a job's result, an adapter, merged weights, or a GGUF file."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from finetune_api.failures import FailureReason
from finetune_trainer.cli.find_result import LocalResult, find_local_result, find_result_above
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.json_files import load_json


class Kind(Enum):
    """Form of the weights; the value is its name for people."""

    ADAPTER = "adapter"
    FOLDER = "model folder"
    GGUF = "GGUF file"


@dataclass(frozen=True)
class BaseSource:
    """The base model: a source URI and, of an hf:// source, its commit."""

    uri: str
    revision: str | None = None


@dataclass(frozen=True)
class FoundModel:
    """Weights to talk to, and the base that they were made from as far as it is known."""

    kind: Kind
    path: Path
    base: BaseSource | None = None
    tokenizer: Path | None = None
    """Folder with the tokenizer that was trained with, if it is not in `path`."""


def find_model(name: str, base: str | None, *, compare: bool) -> FoundModel:
    """Finds the model that `name` means; `base` is what the user says about the base, if anything.

    Of a job's result it takes the merged weights, else the adapter; to `compare`, the adapter first, because it and its
    base are one model in memory. Raises TrainerError with what to give instead.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        result = find_result_above(path)
        return FoundModel(Kind.GGUF, path, _base_of(base, result), result.adapter if result else None)

    if (path / "adapter_config.json").is_file():
        return FoundModel(Kind.ADAPTER, path, _base_of(base, find_result_above(path)) or _base_of_adapter(path))
    if (path / "config.json").is_file():
        return FoundModel(Kind.FOLDER, path, _base_of(base, find_result_above(path)))

    result = find_local_result(path) if path.is_dir() else None
    if result is None:
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, _nothing_found(name, path))
    return _choose(result, _base_of(base, result), compare=compare)


def _choose(result: LocalResult, base: BaseSource | None, *, compare: bool) -> FoundModel:
    adapter = None
    if result.adapter is not None:
        adapter = FoundModel(Kind.ADAPTER, result.adapter, base or _base_of_adapter(result.adapter))
    merged = FoundModel(Kind.FOLDER, result.merged, base) if result.merged is not None else None

    first, second = (adapter, merged) if compare else (merged, adapter)
    if (chosen := first or second) is not None:
        return chosen
    return FoundModel(Kind.GGUF, result.gguf[0], base)


def _base_of(given: str | None, result: LocalResult | None) -> BaseSource | None:
    """The base that the user names, else that of the result's manifest."""
    if given is not None:
        return BaseSource(given if "://" in given else _from_path(given))
    if result is None or result.manifest is None:
        return None
    return BaseSource(result.manifest.model_source, result.manifest.model_revision)


def _from_path(given: str) -> str:
    """A source URI of a folder, or of a repository of the Hub written as org/name."""
    folder = Path(given).expanduser()
    return f"file://{folder.resolve()}" if folder.exists() or given.count("/") != 1 else f"hf://{given}"


def _base_of_adapter(folder: Path) -> BaseSource | None:
    """The base that peft's configuration names, if it is a repository of the Hub or a folder that exists."""
    config = load_json(folder / "adapter_config.json")
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        return None
    uri = _from_path(name)
    if uri.startswith("file://") and not Path(name).is_dir():
        return None
    return BaseSource(uri, revision if isinstance(revision, str) else None)


def _nothing_found(name: str, path: Path) -> str:
    if name.startswith("s3://"):
        return f"{name} is not on this machine: run `finetune artifacts {name} --download DIR`, then chat with DIR"
    if not path.exists():
        return f"there is no {name}: give a job's output folder, a merged or adapter folder, or a .gguf file"
    return (
        f"{name} holds no model: give a folder with manifest.json (a job's output), config.json (merged weights) or "
        "adapter_config.json, or a .gguf file"
    )
