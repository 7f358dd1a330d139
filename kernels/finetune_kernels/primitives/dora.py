"""DoRA: the rows of W + s B A are scaled to magnitudes m that train; their norms count as constants in backward.

    y = g (x W^T + s (x A^T) B^T) + bias,               g = m / |W + s B A|
    |W + s B A|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>            by rows, with no [out, in] tensor beside W
    dm = sum over rows of dy (x W^T + s (x A^T) B^T) / |W + s B A|

Shapes: x [T, in], W [out, in], A [r, in], B [out, r], m, g and the norms [out], the last two in fp32.

So an adapter is a LoRA adapter with B' = g B beside a base layer whose outputs are multiplied by g. Multiplying W
instead was rejected: in bfloat16 a factor within 0.2 % of 1 leaves a weight as it is, at every token alike.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (constant norms: its section 4.3).
"""

from typing import NamedTuple

import torch

from finetune_kernels.primitives.lora_delta import LoraDelta
from finetune_kernels.primitives.precision import widen

CHUNK = 2048
"""Rows whose outputs are recomputed at once for the gradient of m."""


class DoraScales(NamedTuple):
    """DoRA's factors and norms of a group's outputs, fp32 [out]; both are 1 for plain LoRA."""

    factor: torch.Tensor
    """g [out]."""
    norms: torch.Tensor
    """|W + s B A| [out]."""


def row_squares(w: torch.Tensor) -> torch.Tensor:
    """Returns |W|^2 of each row of W [out, in], fp32 or fp64 [out]."""
    norms: torch.Tensor = torch.linalg.vector_norm(w, dim=1, dtype=torch.promote_types(w.dtype, torch.float32))
    return norms.square()


def row_norms(w: torch.Tensor, squares: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns |W + s B A| of each row, fp32 or fp64 [out]: w [out, in], its `squares` [out], a [r, in], b [out, r]."""
    wide_a, wide_b = widen(a), widen(b)
    crossed = (widen(w @ a.T) * wide_b).sum(1)  # <W A^T, B> by rows
    own = (wide_b @ (wide_a @ wide_a.T) * wide_b).sum(1)  # <B A A^T, B> by rows
    return (squares + 2 * scale * crossed + scale**2 * own).sqrt()


def reference_row_norms(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns the norms by their definition, with the adapted weight in memory."""
    return (widen(w) + scale * widen(b) @ widen(a)).square().sum(1).sqrt()


def magnitude_gradient(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, delta: LoraDelta, norms: torch.Tensor
) -> torch.Tensor:
    """Returns dm, fp32 or fp64 [out]: dy [T, out], x [T, in], w [out, in]; the delta's B is without the factor g."""
    total = torch.zeros_like(norms)
    for first in range(0, x.shape[0], CHUNK):
        rows = slice(first, first + CHUNK)
        u = (x[rows] @ w.T).addmm_(delta.xa[rows], delta.b.T, alpha=delta.scale)  # [CHUNK, out], without g
        total += u.mul_(dy[rows]).sum(0, dtype=total.dtype)
        del u  # before the next chunk has its own
    return total / norms
