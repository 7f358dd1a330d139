"""The RMS norm of q and k, in registers beside RoPE: of each head, before RoPE (Qwen3, Gemma 3) or after it (Hunyuan),
or of all heads of a row at once (OLMo 2). Gemma 4 norms each head of v, too, without weights.

    y = x * rstd * w,   rstd = 1 / sqrt(mean(x^2) + eps)      mean over a head [D], or over all heads of q, or of k

The kernels here are parts of `rotary_embedding`'s, which has a row of q, k and v in registers, as pairs of elements.

Source: Henry et al., "Query-Key Normalization for Transformers", 2020; OLMo et al., "2 OLMo 2 Furious", 2025.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from finetune_kernels.primitives.precision import widen

Place = Literal["head", "row", "rotated head"]


@dataclass(frozen=True)
class HeadNorm:
    """The norm of q and of k; to their weights, Gemma's offset of 1 has been added."""

    query: torch.Tensor
    """[D], or [H D] for a row."""
    key: torch.Tensor
    """[D], or [H_kv D] for a row."""
    eps: float
    place: Place = "head"
    """What is normed: each head before RoPE, all heads of a row before RoPE, or each head after RoPE."""
    value: bool = False
    """True if each head of v is normed as well, without weights; together with `place` "head"."""

    @property
    def is_last(self) -> bool:
        """True if RoPE comes first."""
        return self.place == "rotated head"

    @property
    def takes_rows(self) -> bool:
        """True if all heads of a row are normed at once."""
        return self.place == "row"


def reference(x: torch.Tensor, weight: torch.Tensor, norm: HeadNorm) -> torch.Tensor:
    """Returns the formula's y for x [T, H, D] in fp32 or fp64; `weight` is the norm's for these heads."""
    flat = x.flatten(1) if norm.takes_rows else x
    rstd = torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + norm.eps)
    return (flat * rstd * widen(weight)).view(x.shape)


def reference_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, norm: HeadNorm) -> torch.Tensor:
    """Returns the gradient of x [T, H, D] by the formula."""
    flat, g = (x.flatten(1), dy.flatten(1)) if norm.takes_rows else (x, dy)
    rstd = torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + norm.eps)
    g = g * widen(weight)
    return (rstd * (g - flat * rstd * rstd * (g * flat).mean(-1, keepdim=True))).view(x.shape)


@triton.jit
def _load_weights(  # type: ignore[no-untyped-def]
    wq_ptr, wk_ptr, head, offsets, mask, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr,
    VALUE: tl.constexpr,
):  # fmt: skip
    """Norm weights of the elements `offsets` of each head, q's or k's, or 1 for v's, [BLOCK_H, BLOCK_D]."""
    if ROW:
        q_mask, k_mask = mask & (head < H)[:, None], mask & ((head >= H) & (head < H + H_KV))[:, None]
        q = tl.load(wq_ptr + head[:, None] * D + offsets[None, :], mask=q_mask, other=0.0).to(tl.float32)
        k = tl.load(wk_ptr + (head - H)[:, None] * D + offsets[None, :], mask=k_mask, other=0.0).to(tl.float32)
    else:
        q = tl.load(wq_ptr + offsets[None, :], mask=mask, other=0.0).to(tl.float32)
        k = tl.load(wk_ptr + offsets[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.where(head[:, None] < H, q, k)
    if VALUE:
        w = tl.where(head[:, None] < H + H_KV, w, 1.0)
    return w


@triton.jit
def _mean_products(  # type: ignore[no-untyped-def]
    a1, b1, a2, b2, head, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr
):
    """Mean of a b over the elements of each head, or over all heads of q or k, [BLOCK_H, 1]."""
    sums = tl.sum(a1 * b1, axis=1) + tl.sum(a2 * b2, axis=1)
    if ROW:
        q = tl.sum(tl.where(head < H, sums, 0.0), axis=0) / H
        k = tl.sum(tl.where((head >= H) & (head < H + H_KV), sums, 0.0), axis=0) / H_KV
        sums = tl.where(head < H, q, k)
    return (sums / D)[:, None]


@triton.jit
def _norm_backward(  # type: ignore[no-untyped-def]
    g1, g2, x1, x2, w1, w2, head, eps, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr
):
    """Gradient of the norm's input x from that of its output g, both as pairs [BLOCK_H, BLOCK_D]."""
    rstd = tl.rsqrt(_mean_products(x1, x1, x2, x2, head, H, H_KV, D, ROW) + eps)
    g1 *= w1
    g2 *= w2
    mean = _mean_products(g1, x1, g2, x2, head, H, H_KV, D, ROW)
    return rstd * (g1 - x1 * rstd * rstd * mean), rstd * (g2 - x2 * rstd * rstd * mean)
