"""The tensors of a model's weight files, by their headers alone: all files together, and compared with the index.

The files are chosen as transformers chooses them: model.safetensors, or the shards that the index names.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.safetensors_header import TensorHeader, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PARALLEL_READS = 8
NAMED = 3
"""Names that an error lists."""
MASKS = ("BOOL", "U8")
"""Types of causal masks, which some files of old families hold as `attention.bias`."""

ReadFile = Callable[[str, int, int], bytes]
"""Reads bytes [start, end) of a file by its name."""


def list_weights(files: Mapping[str, int], read: ReadFile) -> list[TensorHeader]:
    """The tensors of a model whose `files` have these sizes, without causal masks.

    Raises TrainerError: ModelNotFound for a file that is missing, InvalidConfiguration for one that is damaged or that
    differs from the index; whatever `read` raises.
    """
    if INDEX_NAME not in files:
        if SINGLE_NAME not in files:
            message = (
                f"the model has neither {SINGLE_NAME} nor {INDEX_NAME}, which name its weights; pickled weights "
                "(.bin, .pt) are never read: convert them to safetensors"
            )
            raise TrainerError(FailureReason.MODEL_NOT_FOUND, message)
        return _without_masks(_read(files, [SINGLE_NAME], read))

    size = files[INDEX_NAME]
    placed = _parse_index(read(INDEX_NAME, 0, size) if size else b"")
    shards = sorted(set(placed.values()))
    if missing := [name for name in shards if name not in files]:
        message = f"{INDEX_NAME} names {_some(missing)}, which the model's folder lacks: get the missing files"
        raise TrainerError(FailureReason.MODEL_NOT_FOUND, message)
    if SINGLE_NAME in files and SINGLE_NAME not in shards:
        # transformers would read the one, and an export the others.
        raise _error(f"the model has both {SINGLE_NAME} and {INDEX_NAME} with other files: remove one of them")

    tensors = _read(files, shards, read)
    _compare(placed, tensors)
    return _without_masks(tensors)


def list_weights_below(folder: Path) -> list[TensorHeader]:
    """The tensors of the model in a local folder. Raises like `list_weights`."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return list_weights(sizes, lambda name, start, end: read_range(folder / name, start, end))


def read_range(path: Path, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, or fewer if it ends before."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def _without_masks(tensors: Iterable[TensorHeader]) -> list[TensorHeader]:
    """The tensors without the causal masks [1, 1, n, n] of old files (Pythia), which transformers makes itself."""
    return [tensor for tensor in tensors if not _is_mask(tensor)]


def _is_mask(tensor: TensorHeader) -> bool:
    has_its_shape = len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]
    return has_its_shape and tensor.dtype in MASKS and tensor.name.endswith(".bias")


def _read(files: Mapping[str, int], names: Iterable[str], read: ReadFile) -> list[TensorHeader]:
    """The tensors of several files, of which some are read at a time."""

    def read_one(name: str) -> list[TensorHeader]:
        return read_header(name, files[name], lambda start, end: read(name, start, end))

    with ThreadPoolExecutor(PARALLEL_READS, "headers") as readers:
        return [tensor for tensors in readers.map(read_one, names) for tensor in tensors]


def _parse_index(content: bytes) -> dict[str, str]:
    """The file of each tensor."""
    try:
        index = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _error(f"{INDEX_NAME} is not valid JSON: {error}") from error

    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise _error(f"{INDEX_NAME} has no weight_map from tensor names to file names")
    return placed


def _compare(placed: Mapping[str, str], tensors: Iterable[TensorHeader]) -> None:
    """Raises TrainerError if two files hold a tensor, or none does."""
    found: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise _error(f"both {found[tensor.name]} and {tensor.file} hold {tensor.name}: get the files again")
        found[tensor.name] = tensor.file

    if lacking := [name for name in placed if name not in found]:
        raise _error(f"{INDEX_NAME} lists tensors that its files lack: {_some(lacking)}; get the files again")


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _error(message: str) -> TrainerError:
    return TrainerError(FailureReason.INVALID_CONFIGURATION, message)
