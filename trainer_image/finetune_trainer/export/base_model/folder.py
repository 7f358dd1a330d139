"""The base model as one value: configs, locations of the tensors, and the tokenizer of a Hugging Face model folder.

Each file is read once, here; what comes after an export's start takes the value, not the folder.
"""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from finetune_api.base import Json
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.companions import GENERATION, Companions
from finetune_trainer.export.base_model.ends import with_ends
from finetune_trainer.export.base_model.full_config import read_full_config
from finetune_trainer.export.base_model.json_files import load_json, load_json_if_present, write_json
from finetune_trainer.export.base_model.language_model import (
    has_language_model,
    language_model_config,
    language_model_tensors,
)
from finetune_trainer.export.base_model.nf4_tensors import Nf4Tensor, fold_nf4
from finetune_trainer.export.base_model.output_head import HEAD, TIES, is_head_tied
from finetune_trainer.export.base_model.published_tokenizer import tokenizer_of_adapter
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor, locate
from finetune_trainer.model.weight_files import INDEX_NAME, list_weights_below

OTHER_FILES = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


@dataclass(frozen=True)
class BaseModel:
    """A base model; of a multimodal checkpoint, its language model alone."""

    path: Path
    config: Json
    """config.json as written; for a multimodal checkpoint, its language model's section with defaults filled in."""
    tensors: tuple[StoredTensor, ...]
    """All weights, in the order in which they are stored."""
    is_sharded: bool
    is_multimodal: bool
    """True if the checkpoint also reads images; that part is left out."""
    tokenizer: TokenizerFiles

    @property
    def is_dequantised(self) -> bool:
        """True if the weights exist in NF4 only, and are dequantised."""
        return any(isinstance(tensor, Nf4Tensor) for tensor in self.tensors)

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order in which they are stored."""
        return [(tensor.name, tensor.shape) for tensor in self.tensors]

    @cached_property
    def is_tied(self) -> bool:
        """True if the output head is the embedding, by the weights."""
        # Only where it matters: transformers need not know a family whose weights are merged.
        config = self._stated_config if self.has_stored_head and TIES not in self.config else self.config
        return is_head_tied(config.get(TIES), self.tensors)

    @property
    def has_stored_head(self) -> bool:
        """True if the weight files hold an output head."""
        return any(tensor.name == HEAD for tensor in self.tensors)

    @property
    def companions(self) -> Companions:
        """Files that lie beside published weights, so that they answer and stop."""
        return Companions(self.path, self.config, self.generation_config, self.tokenizer)

    @cached_property
    def full_config(self) -> Json:
        """The config with every default filled in and RoPE settings in one form, by transformers' config classes.

        Raises UnsupportedArchitectureError if transformers cannot read the config.
        """
        return self._stated_config | {TIES: self.is_tied}

    @cached_property
    def _stated_config(self) -> Json:
        """The config as it says itself, with every default filled in."""
        return self.config if self.is_multimodal else read_full_config(self.path)

    @cached_property
    def generation_config(self) -> Json:
        """generation_config.json as written; empty if there is none."""
        return load_json_if_present(self.path / GENERATION)


def open_base_model(path: Path, *, adapter: Path | None = None) -> BaseModel:
    """Read config and safetensors headers below `path`; raises InvalidBaseError naming the missing or damaged file.

    The tokenizer is the one that `adapter` was trained with, above all its chat template.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise InvalidBaseError(f"{path} has no config.json: it is not a Hugging Face model folder")
    config = load_json(config_path)

    tensors, is_sharded = _list_tensors(path), (path / INDEX_NAME).is_file()

    # From here on a multimodal checkpoint looks like a plain one of its language model.
    is_multimodal = has_language_model(config)
    if is_multimodal:
        config, tensors = language_model_config(path, config), language_model_tensors(tensors)

    return BaseModel(path, config, fold_nf4(tensors), is_sharded, is_multimodal, tokenizer_of_adapter(path, adapter))


def _list_tensors(folder: Path) -> list[StoredTensor]:
    """All tensors of the folder's weight files, in the order in which they are stored."""
    try:
        headers = list_weights_below(folder)
    except TrainerError as error:
        raise InvalidBaseError(f"{folder}: {error.message}") from error
    return [locate(header, folder / header.file) for header in headers]


def write_side_files(base: BaseModel, target: Path, *, dtype: str) -> None:
    """Put everything but the weights into `target`: config, generation config, tokenizer and licence.

    The config is without quantisation (the weights are not quantised) and without remote code, and says of ends and
    output head what is so.
    """
    config = {key: value for key, value in base.config.items() if key not in ("quantization_config", "auto_map")}
    # transformers 4 called it torch_dtype.
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if TIES in config or base.has_stored_head:
        config[TIES] = base.is_tied
    ends = base.companions.write(target)
    write_json(target / "config.json", with_ends(config, ends))

    for name in OTHER_FILES:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, target / name)
