"""The language model inside a checkpoint that also reads images or sound, and all that is copied beside it.

Training, merging and GGUF files see a model like any other of its family, under that family's names. Merged folders are
the whole checkpoint again: its config, its names, and the bytes of every tensor that is not the language model's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune_api.base import Json
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.ends import EOS, with_ends
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor
from finetune_trainer.model.expert_files import turned_shape, turned_stacks
from finetune_trainer.model.multimodal import PREFIXES, TURNED_TYPES, language_model_names
from finetune_trainer.model.published_formats import BLOCKS

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tekken.json")
"""What makes images and sound into input; published beside merged weights as it is."""
ROWS = "vocab_size"
_DTYPE = ("dtype", "torch_dtype")  # transformers 4 has the second


@dataclass(frozen=True)
class WholeCheckpoint:
    """A multimodal checkpoint around its language model."""

    config: Json
    """config.json as written."""
    names: Mapping[str, str]
    """Name in the language model alone -> name in the files."""
    copied: tuple[StoredTensor, ...]
    """All other tensors."""
    rows: int | None = None
    """Rows of the embedding, if new tokens are among them."""

    def stored_name(self, name: str) -> str:
        """The name in the files of a tensor of the language model, decoded or not."""
        for part in ("", BLOCKS):
            if (stored := self.names.get(f"{name}{part}")) is not None:
                return stored.removesuffix(part)
        raise AssertionError(f"the checkpoint has no {name}")

    def merged_config(self, dtype: str, ends: list[int]) -> Json:
        """config.json of the merged checkpoint: as written, without quantisation and remote code."""
        config = {key: value for key, value in self.config.items() if key not in ("quantization_config", "auto_map")}
        text, grown = config.get("text_config"), {} if self.rows is None else {ROWS: self.rows}
        if isinstance(text, dict):
            stated = {name: dtype for name in _DTYPE if name in text}
            config["text_config"] = (with_ends(text, ends) if EOS in text else text) | stated | grown

        if ROWS in config or not isinstance(text, dict):
            config |= grown
        config |= {name: dtype for name in _DTYPE if name in config} or {"dtype": dtype}
        return with_ends(config, ends) if EOS in config or not isinstance(text, dict) else config


def split_checkpoint(
    tensors: Sequence[StoredTensor], config: Mapping[str, Any]
) -> tuple[list[StoredTensor], WholeCheckpoint]:
    """The language model's tensors, named as in a checkpoint of it alone, and the rest of the checkpoint.

    Raises InvalidBaseError if no tensor belongs to the language model.
    """
    names = language_model_names([tensor.name for tensor in tensors])
    own = [replace(tensor, name=names[tensor.name]) for tensor in tensors if tensor.name in names]
    if not any(tensor.name.startswith("model.") for tensor in own):
        raise InvalidBaseError(
            f"no tensor of this multimodal checkpoint begins with {', '.join(PREFIXES)}: its language model "
            "cannot be found"
        )

    copied = tuple(tensor for tensor in tensors if tensor.name not in names)
    return own, WholeCheckpoint(dict(config), {alone: stored for stored, alone in names.items()}, copied)


@dataclass(frozen=True)
class TurnedTensor(StoredTensor):
    """A stack of experts [E, in, out] that is read as [E, out, in], without a copy, and written back as it was."""

    stored: StoredTensor

    def to_values(self, data: torch.Tensor) -> torch.Tensor:
        """View the stored values with rows and columns swapped."""
        return self.stored.to_values(data).transpose(1, 2)


def turn_stacks(tensors: Sequence[StoredTensor], config: Mapping[str, Any]) -> tuple[StoredTensor, ...]:
    """The tensors of a language model, with stacks of experts as its class has them; `config` is config.json as
    written. Raises InvalidBaseError for experts that are stored in an unknown order.
    """
    if config.get("model_type") not in TURNED_TYPES:
        return tuple(tensors)
    try:
        turned = turned_stacks((tensor.name, tensor.shape) for tensor in tensors)
    except TrainerError as error:
        raise InvalidBaseError(error.message) from error
    return tuple(_turn(tensor) if tensor.name in turned else tensor for tensor in tensors)


def _turn(tensor: StoredTensor) -> TurnedTensor:
    place = (tensor.path, tensor.offset, tensor.size)
    return TurnedTensor(tensor.name, tensor.dtype, turned_shape(tensor.shape), *place, stored=tensor)
