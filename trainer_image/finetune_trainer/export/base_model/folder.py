"""The base model as one value: configs, locations of the tensors, and the tokenizer of a Hugging Face model folder.

Each file is read once, here; what comes after an export's start takes the value, not the folder.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from finetune_api.base import Json
from finetune_trainer.chat.new_tokens import EMBEDDING, grown_rows
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.adapter_names import CONFIG_NAME
from finetune_trainer.export.base_model.companions import GENERATION, Companions
from finetune_trainer.export.base_model.ends import with_ends
from finetune_trainer.export.base_model.full_config import read_full_config
from finetune_trainer.export.base_model.grown_vocabulary import (
    TRAINED_ROWS,
    Pieces,
    grow,
    split_into_pieces,
    trained_rows_of,
)
from finetune_trainer.export.base_model.json_files import load_json, load_json_if_present, write_json
from finetune_trainer.export.base_model.language_model import (
    PROCESSOR_FILES,
    ROWS,
    TurnedTensor,
    WholeCheckpoint,
    split_checkpoint,
    turn_stacks,
)
from finetune_trainer.export.base_model.nf4_tensors import Nf4Tensor, fold_nf4
from finetune_trainer.export.base_model.output_head import HEAD, TIES, is_head_tied
from finetune_trainer.export.base_model.packed_tensors import PackedTensor, fold_packed
from finetune_trainer.export.base_model.published_tokenizer import tokenizer_of_adapter
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.safetensors_files import DTYPES, NAMES, STORED_TYPES, StoredTensor, locate
from finetune_trainer.model.multimodal import is_multimodal, name_in_language_model
from finetune_trainer.model.weight_files import INDEX_NAME, list_weights_below

QUANTIZATION = "quantization_config"
PREFIXES = {"nemotron_h": ("model.", "backbone.")}
"""`model_type` -> how names of layers begin in transformers' class, and how in published files. transformers saves them
as published."""
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
    whole: WholeCheckpoint | None
    """The checkpoint that also reads images or sound, around the language model; None if the model is all there is."""
    tokenizer: TokenizerFiles
    rows: int | None = None
    """Rows of embedding and head, if new tokens are among them."""

    @property
    def is_dequantised(self) -> bool:
        """True if the weights exist in NF4 only, and are dequantised."""
        return any(isinstance(tensor, Nf4Tensor) for tensor in self.tensors)

    @property
    def packed_formats(self) -> list[str]:
        """Formats of fewer than 16 bits in which weights are published, and from which they are decoded."""
        stored = [tensor.stored if isinstance(tensor, TurnedTensor) else tensor for tensor in self.tensors]
        return sorted({tensor.format.value for tensor in stored if isinstance(tensor, PackedTensor)})

    def name_of(self, adapted: str) -> str:
        """The name here of a tensor that an adapter names as transformers' class does, which renames some of them while
        it loads them."""
        if self.whole is not None:
            return name_in_language_model(adapted)

        loaded, published = PREFIXES.get(self.config.get("model_type", ""), ("", ""))
        renamed = published + adapted.removeprefix(loaded)
        return renamed if adapted.startswith(loaded) and renamed in self._names else adapted

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.tensors)

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
        return self._stated_config | {TIES: self.is_tied} | self._grown

    @cached_property
    def _stated_config(self) -> Json:
        """The config as it says itself, with every default filled in."""
        if self.whole is not None:
            return self.config
        return _without_quantisation(read_full_config(self.path))

    @property
    def _grown(self) -> Json:
        """The config's vocabulary with new tokens; empty without any."""
        return {} if self.rows is None else {ROWS: self.rows}

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

    tensors, is_sharded, whole = _list_tensors(path), (path / INDEX_NAME).is_file(), None
    written = config
    if is_multimodal(config):
        # From here on it looks like a plain checkpoint of its language model.
        tensors, whole = split_checkpoint(tensors, config)
        config = _without_quantisation(read_full_config(path))
        whole = replace(whole, copied=_decode(whole.copied, written))

    own = _decode(tensors, written)
    _check_types(own)
    own = turn_stacks(own, written)
    base = BaseModel(path, config, own, is_sharded, whole, tokenizer_of_adapter(path, adapter))
    return base if adapter is None else with_new_tokens(base, new_tokens_of_adapter(adapter, path))


def with_new_tokens(base: BaseModel, pieces: Pieces) -> BaseModel:
    """Return the base with rows for new tokens in embedding and head; itself without any.

    Raises InvalidBaseError for a base whose embedding has another name.
    """
    if not pieces:
        return base
    stored = dict(base.shapes).get(EMBEDDING)
    if stored is None:
        raise InvalidBaseError(f"the adapter has new tokens, but the base has no {EMBEDDING} to put them into")

    rows = grown_rows(stored[0], pieces)
    whole = replace(base.whole, rows=rows) if base.whole is not None else None
    return replace(base, tensors=grow(base.tensors, pieces), whole=whole, rows=rows)


def new_tokens_of_adapter(adapter: Path, base: Path) -> Pieces:
    """Return the tokens that an adapter trained rows for and that the tokenizer of `base` lacks, with their pieces."""
    settings = load_json_if_present(adapter / CONFIG_NAME).get(TRAINED_ROWS)
    trained = {number for _, ids in trained_rows_of(settings) for number in ids}
    if not trained or not TokenizerFiles(adapter).exists:
        return {}

    known = TokenizerFiles(base)
    added = trained - set(known.tokenizer.get_vocab().values()) if known.exists else trained
    return split_into_pieces(TokenizerFiles(adapter).load_description(), added) if added else {}


def _without_quantisation(config: Json) -> Json:
    return {key: value for key, value in config.items() if key != QUANTIZATION}


def _decode(tensors: Sequence[StoredTensor], config: Json) -> tuple[StoredTensor, ...]:
    """The tensors, with those of fewer than 16 bits as tensors that are decoded when they are read."""
    return fold_packed(fold_nf4(tensors), config)


def _check_types(tensors: Sequence[StoredTensor]) -> None:
    """Raise InvalidBaseError for a tensor of a type that cannot be exported."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES.values() and type(tensor) is StoredTensor:
            raise InvalidBaseError(
                f"{tensor.name} in {tensor.path} is stored as {NAMES[tensor.dtype]}; only F32, F16, BF16, bitsandbytes "
                "NF4, FP8 with its scales and MXFP4 weights can be exported: use the original 16-bit model"
            )


def _list_tensors(folder: Path) -> list[StoredTensor]:
    """All tensors of the folder's weight files, in the order in which they are stored."""
    try:
        headers = list_weights_below(folder)
    except TrainerError as error:
        raise InvalidBaseError(f"{folder}: {error.message}") from error
    return [locate(header, folder / header.file, types=STORED_TYPES) for header in headers]


def write_side_files(base: BaseModel, target: Path, *, dtype: str) -> None:
    """Put everything but the weights into `target`: config, generation config, tokenizer and licence.

    The config is without quantisation (the weights are not quantised) and without remote code, and says of ends and
    output head what is so.
    """
    ends = base.companions.write(target)
    write_json(target / "config.json", _merged_config(base, dtype, ends))

    for name in (*OTHER_FILES, *(PROCESSOR_FILES if base.whole is not None else ())):
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, target / name)


def _merged_config(base: BaseModel, dtype: str, ends: list[int]) -> Json:
    if base.whole is not None:
        return base.whole.merged_config(dtype, ends)

    config = {key: value for key, value in base.config.items() if key not in (QUANTIZATION, "auto_map")}
    if base.rows is not None:
        config[ROWS] = base.rows
    # transformers 4 called it torch_dtype.
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if TIES in config or base.has_stored_head:
        config[TIES] = base.is_tied
    return with_ends(config, ends)
