"""The language model inside a checkpoint that also reads images or sound, and all that is copied beside it.

Training, merging and GGUF files see a model like any other of its family, under that family's names. Merged folders are
the whole checkpoint again: its config, its names, and the bytes of every tensor that is not the language model's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.base import Json
from finetune_trainer.export.base_model.ends import EOS, with_ends
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor
from finetune_trainer.model.multimodal import PREFIXES, language_model_names
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
