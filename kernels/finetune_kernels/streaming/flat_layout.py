"""Tensors one after the other in one buffer of bytes, so that one copy or one collective moves all of them.

    bytes   [ codes of q | scales of q | codes of k | scales of k | ... ]

Each begins at a multiple of 256 bytes.
"""

from collections.abc import Sequence

import torch

ALIGNMENT = 256
"""Bytes that tensors in a buffer begin at a multiple of: kernels read more at a time from aligned addresses."""


def flat_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of a buffer that holds `tensors`."""
    return sum(aligned(tensor.nbytes) for tensor in tensors)


def views_in(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the places of `tensors` in `buffer`, bytes on any device, as tensors of their types and shapes."""
    sizes = [aligned(tensor.nbytes) for tensor in tensors]
    parts = torch.split(buffer[: sum(sizes)], sizes)
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)
    ]


def move_into(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies the contents of `tensors` into `buffer`, which they are views of from now on, and returns the views. They
    stay the objects that they are, wherever they are referred to."""
    views = views_in(buffer, tensors)
    for tensor, view in zip(tensors, views, strict=True):
        view.copy_(tensor.detach())
        tensor.data = view
    return views


def aligned(size: int, to: int = ALIGNMENT) -> int:
    """The next multiple of `to`."""
    return -(-size // to) * to
