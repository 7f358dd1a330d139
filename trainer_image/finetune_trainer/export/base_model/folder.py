"""A Hugging Face model folder: which files hold the weights, and what else belongs to the model."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from finetune_trainer.export.base_model.language_model import (
    has_language_model,
    language_model_config,
    language_model_tensors,
)
from finetune_trainer.export.base_model.nf4_tensors import Nf4Tensor, fold_nf4
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor, list_tensors

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
MORE_TEMPLATES = "additional_chat_templates"  # a folder of named ones
OTHER_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


@dataclass(frozen=True)
class BaseModel:
    """A base model: its config as written and its tensors in the order they are stored; the language model alone where
    the checkpoint reads images, too."""

    path: Path
    config: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    is_sharded: bool

    @property
    def is_dequantised(self) -> bool:
        """Whether only NF4 weights exist, which are decoded."""
        return any(isinstance(tensor, Nf4Tensor) for tensor in self.tensors)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return {tensor.name for tensor in self.tensors}


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises InvalidBaseError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidBaseError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidBaseError(f"{path} holds no JSON object")
    return content


def open_base_model(path: Path) -> BaseModel:
    """Read config and safetensors headers below `path`; raises InvalidBaseError saying which file is missing or
    damaged."""
    config_path = path / "config.json"
    if not config_path.is_file():
        raise InvalidBaseError(f"{path} has no config.json: it is not a Hugging Face model folder")
    config = load_json(config_path)
    index_path = path / INDEX_NAME
    if index_path.is_file():
        weight_map = load_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InvalidBaseError(f"{index_path} has no weight_map from tensors to file names")
        tensors = [tensor for name in sorted(set(weight_map.values())) for tensor in list_tensors(_shard(path, name))]
        names = Counter(tensor.name for tensor in tensors)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise InvalidBaseError(f"several files of {index_path} hold {twice[:5]}")
        missing = weight_map.keys() - names.keys()
        if missing:
            raise InvalidBaseError(f"{index_path} lists tensors that its files lack: {sorted(missing)[:5]}")
    elif (path / SINGLE_NAME).is_file():
        tensors = list_tensors(path / SINGLE_NAME)
    else:
        raise InvalidBaseError(
            f"{path} has neither {SINGLE_NAME} nor {INDEX_NAME}; pickled weights (.bin, .pt) are not read"
        )
    if has_language_model(config):
        config, tensors = language_model_config(path, config), language_model_tensors(tensors)
    return BaseModel(path, config, fold_nf4(tensors), is_sharded=index_path.is_file())


def _shard(folder: Path, name: str) -> Path:
    if PurePath(name).name != name or not (folder / name).is_file():
        raise InvalidBaseError(f"{INDEX_NAME} names {name!r}, which is no file in {folder}")
    return folder / name


def choose_tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """The adapter's tokenizer, where one was saved with it, is the one that was trained with (its chat template above
    all)."""
    return adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else base


def write_side_files(base: BaseModel, tokenizer: Path, target: Path, *, dtype: str) -> None:
    """Put config (without quantisation and remote code), generation config, tokenizer and licence into `target`."""
    config = {key: value for key, value in base.config.items() if key not in ("quantization_config", "auto_map")}
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    templates = [path.relative_to(tokenizer).as_posix() for path in (tokenizer / MORE_TEMPLATES).glob("*.jinja")]
    if templates:
        (target / MORE_TEMPLATES).mkdir()
    for folder, names in ((base.path, OTHER_FILES), (tokenizer, (*TOKENIZER_FILES, *templates))):
        for name in names:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
