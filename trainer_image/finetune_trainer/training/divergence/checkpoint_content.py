"""Judges a downloaded checkpoint before training goes on from it: every file can be read, and fits the model.

Digests prove that the files are those that were saved, not that they were whole when they were saved.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals

from finetune_kernels.primitives.multi_tensor_adamw import BLOCK
from finetune_trainer.training.divergence.checkpoint_files import OPTIMIZER_NAME, find_non_finite, tensors_of

STATE_NAME = "trainer_state.json"
ADAPTER_NAME = "adapter_model.safetensors"
FIRST_MOMENTS = ("exp_avg", "state1")
"""Names in the states of PyTorch's and of bitsandbytes' AdamW."""


def find_damage(checkpoint: Path, model: Any) -> str | None:
    """Returns what makes a checkpoint useless to `model`, a peft model, or None."""
    if (damage := next(_unreadable(checkpoint), None)) is not None:
        return damage
    return _misfit(checkpoint, model) or find_non_finite(checkpoint)


def _unreadable(checkpoint: Path) -> Iterator[str]:
    """Yields the files that cannot be read."""
    for path in sorted(checkpoint.rglob("*")):
        read = _READERS.get(path.suffix)
        if read is None or not path.is_file():
            continue

        try:
            read(path)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (a damaged file can make a reader raise anything)
            yield f"{path.relative_to(checkpoint)} cannot be read ({type(error).__name__})"


def _misfit(checkpoint: Path, model: Any) -> str | None:
    """Returns the first thing that is not of this model."""
    expected = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    found = _shapes(checkpoint / ADAPTER_NAME)
    if (missing := sorted(expected.keys() - found.keys())) != []:
        return f"{ADAPTER_NAME} lacks {missing[0]}"
    for name, shape in expected.items():
        if found[name] != shape:
            return f"{ADAPTER_NAME} has {name} of shape {found[name]} instead of {shape}"

    return _misfit_of_optimizer(checkpoint / OPTIMIZER_NAME, model)


def _misfit_of_optimizer(path: Path, model: Any) -> str | None:
    """Compares the size of the first moments with that of the parameters: optimisers arrange them differently."""
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    moments = [tensor for name, tensor in tensors_of(state) if name in FIRST_MOMENTS]
    if not moments:
        return None

    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    padded = [-(-size // BLOCK) * BLOCK for size in sizes]  # as our 8-bit optimiser keeps them
    kept = sum(tensor.numel() for tensor in moments)
    if kept in (sum(sizes), sum(padded)):
        return None
    return f"{OPTIMIZER_NAME} is of {kept:,} parameters instead of {sum(sizes):,}"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _read_json(path: Path) -> None:
    if path.name == STATE_NAME:
        TrainerState.load_from_json(str(path))
    json.loads(path.read_text(encoding="utf-8"))


def _read_pickle(path: Path) -> None:
    with safe_globals():  # type: ignore[no-untyped-call]
        torch.load(path, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[Path], object]] = {
    ".json": _read_json,
    ".pt": _read_pickle,
    ".pth": _read_pickle,
    ".safetensors": _shapes,
}
