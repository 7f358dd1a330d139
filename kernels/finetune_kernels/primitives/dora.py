"""DoRA: the rows of W + s B A are brought to magnitudes m that train, and their norms count as constants in backward.

    y = g (x W^T + s (x A^T) B^T) + bias,    g = m / |W + s B A|
    |W + s B A|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>            by rows, with no [out, in] tensor beside W
    dm = sum over rows of dy (x W^T + s (x A^T) B^T) / |W + s B A|

So an adapter is a LoRA adapter with B' = g B beside a base layer whose outputs are multiplied by g. Multiplying W
instead was rejected: in bfloat16 a factor within 0.2 % of 1 leaves a weight as it is, at every token alike.
"""

from typing import NamedTuple

import torch

from finetune_kernels.primitives.precision import widen

CHUNK = 2048
"""Rows whose outputs are made again at once for the gradient of m."""


class Scales(NamedTuple):
    """Of a group's outputs, wide; both 1 where a linear has no magnitudes."""

    factor: torch.Tensor
    """g [out]."""
    norms: torch.Tensor
    """|W + s B A| [out]."""


def row_squares(w: torch.Tensor) -> torch.Tensor:
    """|W|^2 of each row of W [out, in], wide."""
    norms: torch.Tensor = torch.linalg.vector_norm(w, dim=1, dtype=torch.promote_types(w.dtype, torch.float32))
    return norms.square()


def row_norms(w: torch.Tensor, squares: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """|W + s B A| of each row, wide: w [out, in] and its `squares`, a [r, in], b [out, r]."""
    wide_a, wide_b = widen(a), widen(b)
    crossed = (widen(w @ a.T) * wide_b).sum(1)
    own = (wide_b @ (wide_a @ wide_a.T) * wide_b).sum(1)
    return (squares + 2 * scale * crossed + scale**2 * own).sqrt()


def reference_row_norms(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The norms by their definition."""
    return (widen(w) + scale * widen(b) @ widen(a)).square().sum(1).sqrt()


def magnitude_gradient(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, inner: torch.Tensor, b: torch.Tensor, scale: float,
    norms: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """dm [out], wide: dy [T, out], x [T, in], w [out, in], inner = x A^T [T, r], b [out, r] without g."""
    total = torch.zeros_like(norms)
    for first in range(0, x.shape[0], CHUNK):
        rows = slice(first, first + CHUNK)
        u = (x[rows] @ w.T).addmm_(inner[rows], b.T, alpha=scale)
        total += u.mul_(dy[rows]).sum(0, dtype=total.dtype)
    return total / norms
