"""Pinned host memory in pieces, from and to which a GPU copies by itself.

PyTorch rounds every pinned buffer up to a power of two: the inputs of one layer of 70B at 92,160 tokens, 1.4 GiB, would
take 2 GiB, and those of 80 layers 47 GiB more than planned for. Of pieces, the last one alone is rounded.
"""

from collections.abc import Sequence

import torch

PIECE = 1 << 24
"""Bytes of a piece."""


def pinned_pieces(size: int, *, pinned: bool) -> list[torch.Tensor]:
    """Returns uint8 buffers of `size` bytes in all; not `pinned` where there is no GPU."""
    sizes = [min(PIECE, size - at) for at in range(0, size, PIECE)]
    return [torch.empty(each, dtype=torch.uint8, pin_memory=pinned) for each in sizes]


def copy_to_pieces(pieces: Sequence[torch.Tensor], x: torch.Tensor) -> None:
    """Begins to copy contiguous `x` to the first bytes of `pieces`."""
    for piece, part in _pairs(pieces, x):
        piece.copy_(part, non_blocking=True)


def copy_from_pieces(pieces: Sequence[torch.Tensor], x: torch.Tensor) -> None:
    """Begins to copy the first bytes of `pieces` to contiguous `x`."""
    for piece, part in _pairs(pieces, x):
        part.copy_(piece, non_blocking=True)


def _pairs(pieces: Sequence[torch.Tensor], x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of pieces, and the bytes of `x` that belong there."""
    flat, room = x.view(-1).view(torch.uint8), sum(piece.numel() for piece in pieces)
    if room < flat.numel():
        raise ValueError(f"{flat.numel()} bytes do not fit into pieces of {room}")

    # All pieces but the last one are whole, and there may be more of them than `x` takes.
    return [(piece[: part.numel()], part) for piece, part in zip(pieces, torch.split(flat, PIECE), strict=False)]
