"""The feed-forward half in tiles of rows, where gate and up are not kept: they are most of what a layer needs while it
works (180 KB a token at 8B), and a row of 100,000 tokens needs them for a few thousand tokens at a time only.

Rows do not know of each other here, so tiles change nothing but the order of sums: gradients of the adapters are added
up in fp32. Weights are decoded once for all tiles.
"""

from collections.abc import Iterator

import torch

from finetune_kernels.layers.mlp_block import DownActivations, MlpBlock, MlpPass
from finetune_kernels.ops import rms_norm
from finetune_kernels.planning.activation_policy import TILE_ROWS


def needs_tiles(rows: int) -> bool:
    """Whether so many rows are more than one tile."""
    return rows > TILE_ROWS


def _tiles(rows: int) -> Iterator[slice]:
    return (slice(first, first + TILE_ROWS) for first in range(0, rows, TILE_ROWS))


def forward_in_tiles(
    mlp: MlpBlock, h: torch.Tensor, n2: torch.Tensor, pass_ctx: MlpPass, *, finish: bool
) -> tuple[DownActivations | None, torch.Tensor]:
    """h and its norm n2 [T, hidden] -> what `backward_in_tiles` can use, if it is to `finish` early, and h + MLP."""
    y = torch.empty_like(h)
    parts: list[DownActivations] = []
    with mlp.gate_up.frozen.dequantized(), mlp.down.frozen.dequantized():
        for rows in _tiles(h.shape[0]):
            tile_ctx = pass_ctx.from_row(rows.start)
            finished, added = mlp.finish(mlp.project(n2[rows], tile_ctx), tile_ctx)
            torch.add(added, h[rows], out=y[rows])
            if finish:
                parts.append(finished)
    return (_join(parts) if finish else None), y


def backward_in_tiles(
    mlp: MlpBlock,
    dy: torch.Tensor,
    h: torch.Tensor,
    r2: torch.Tensor,
    finished: DownActivations | None,
    pass_ctx: MlpPass,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As `MlpBlock.backward`, from h alone."""
    dh = torch.empty_like(h)
    sums: list[torch.Tensor] = []
    types: list[torch.dtype] = []
    with mlp.gate_up.frozen.dequantized(), mlp.down.frozen.dequantized():
        for rows in _tiles(h.shape[0]):
            _, n2, _ = rms_norm.forward(h[rows], mlp.norm.weight, mlp.norm.eps)
            tile_ctx = pass_ctx.from_row(rows.start)
            part = (
                None
                if finished is None
                else DownActivations(finished.xa_down[rows], tuple(t[rows] for t in finished.post))
            )
            dh[rows], gradients = mlp.backward(dy[rows], h[rows], r2[rows], mlp.project(n2, tile_ctx), part, tile_ctx)
            if not sums:
                types = [gradient.dtype for gradient in gradients]
                sums = [gradient.float() for gradient in gradients]
            else:
                torch._foreach_add_(sums, [gradient.float() for gradient in gradients])
    return dh, [total.to(kind) for total, kind in zip(sums, types, strict=True)]


def _join(parts: list[DownActivations]) -> DownActivations:
    post = tuple(torch.cat(kept) for kept in zip(*(part.post for part in parts), strict=True))
    return DownActivations(torch.cat([part.xa_down for part in parts]), post)
