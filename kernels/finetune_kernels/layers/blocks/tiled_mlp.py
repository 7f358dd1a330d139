"""The MLP block, or a mixture's, in tiles of rows, for layers that do not save gate and up.

Gate and up are most of what a layer needs while it works (180 KB a token at 8B), and a row of 100,000 tokens needs them
for one tile at a time only. Rows do not depend on each other here, so tiles change nothing but the order of sums:
gradients of the adapters are summed in fp32. Weights are dequantised once for all tiles. A mixture sorts each tile's
rows by expert: the buffers of sorted rows grow with the experts of a token, which a tile bounds.
"""

from collections.abc import Iterator
from typing import Any

import torch

from finetune_kernels.layers.blocks.attention_block import pre_norm
from finetune_kernels.layers.blocks.mlp_block import DownActivations, SavedMlp
from finetune_kernels.planning.block_sizes import TILE_ROWS

Block = Any
"""An `MlpBlock` or a `MixtureBlock`, whose passes and activations are of its own kind."""


def needs_tiles(rows: int) -> bool:
    """True if so many rows are more than one tile."""
    return rows > TILE_ROWS


def _tiles(rows: int) -> Iterator[slice]:
    return (slice(first, first + TILE_ROWS) for first in range(0, rows, TILE_ROWS))


def forward_in_tiles(
    mlp: Block, h: torch.Tensor, n2: torch.Tensor, pass_ctx: Any, *, save_down: bool
) -> tuple[DownActivations | None, torch.Tensor]:
    """h and its norm n2 [T, hidden] -> h + MLP [T, hidden] and, if `save_down`, what `backward_in_tiles` can use."""
    y = torch.empty_like(h)
    parts: list[DownActivations] = []

    with mlp.dequantized():
        for rows in _tiles(h.shape[0]):
            tile_ctx = pass_ctx.from_row(rows.start)
            down, out = mlp.down_projection(mlp.gate_up_projection(n2[rows], tile_ctx), tile_ctx, h.dtype)
            torch.add(out, h[rows], out=y[rows])
            if save_down:
                parts.append(down)
    return (_join(parts) if save_down else None), y


def backward_in_tiles(
    mlp: Block, dy: torch.Tensor, saved: SavedMlp, pass_ctx: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Does what `MlpBlock.backward` does for h + output, and recomputes gate and up of each tile from h [T, hidden]."""
    h, dh = saved.h, torch.empty_like(saved.h)
    sums: list[torch.Tensor] = []
    types: list[torch.dtype] = []

    with mlp.dequantized():
        for rows in _tiles(h.shape[0]):
            _, n2, _ = pre_norm(mlp.norm, h[rows], dtype=mlp.dtype)  # [tile, hidden]
            tile_ctx = pass_ctx.from_row(rows.start)
            tile = SavedMlp(h[rows], saved.rstd[rows], mlp.gate_up_projection(n2, tile_ctx), _cut(saved.down, rows))
            dh[rows], gradients = mlp.backward(dy[rows], tile, tile_ctx, residual=dy[rows])

            # The first tile's gradients begin the fp32 sums.
            if not sums:
                types = [gradient.dtype for gradient in gradients]
                sums = [gradient.float() for gradient in gradients]
            else:
                torch._foreach_add_(sums, [gradient.float() for gradient in gradients])
    return dh, [total.to(kind) for total, kind in zip(sums, types, strict=True)]


def _cut(down: DownActivations | None, rows: slice) -> DownActivations | None:
    """The part of one tile."""
    return None if down is None else DownActivations(down.xa[rows], tuple(t[rows] for t in down.post_norm))


def _join(parts: list[DownActivations]) -> DownActivations:
    """The parts of all tiles as one."""
    post_norm = tuple(torch.cat(tensors) for tensors in zip(*(part.post_norm for part in parts), strict=True))
    return DownActivations(torch.cat([part.xa for part in parts]), post_norm)
