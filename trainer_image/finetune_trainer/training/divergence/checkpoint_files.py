"""Looks for NaN and infinity in the files of a checkpoint: adapter, optimiser state, and the best adapter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

OPTIMIZER_NAME = "optimizer.pt"


def find_non_finite(checkpoint: Path) -> str | None:
    """Returns where the first value is that is no number, as "NaN or infinity in optimizer.pt (exp_avg)", or None.

    Raises whatever the readers raise for a file that cannot be read.
    """
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if not _is_finite(file.get_tensor(name)):
                    return f"NaN or infinity in {path.relative_to(checkpoint)} ({name})"

    path = checkpoint / OPTIMIZER_NAME
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in tensors_of(state):
            if not _is_finite(tensor):
                return f"NaN or infinity in {OPTIMIZER_NAME} ({name})"
    return None


def tensors_of(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a nested state, each with the key that it is stored under."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_of(value, str(key))
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors_of(value, name)


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
