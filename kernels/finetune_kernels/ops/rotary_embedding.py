"""Rotary position embedding of q and k in one launch, with the norm of q and k where the model has one (`head_norm`).

    x = [x1, x2] (halves of a head),   n = x * rstd * w, rstd = 1 / sqrt(mean(x^2) + eps)   (n = x without a norm)
    y1 = n1 cos - n2 sin,   y2 = n2 cos + n1 sin        (Hunyuan norms y instead)

x1 and x2 are the halves of a head, or its even and odd elements (GLM, Cohere, ERNIE). If cos and sin are shorter than
a head (Phi-4-mini, GLM), that holds for its first R elements, and the rest is left unchanged; R = 0 rotates nothing.

Shapes: q, k and v lie side by side in one buffer, as the merged projection writes them, [T, (H + 2 H_kv) D]; cos and
sin are [T, R] of any float type, with equal halves. Arithmetic is fp32, rounded once. Backward takes the gradients as
attention returns them, rotates q's and k's by the opposite angle, and lays all three side by side again, so that one
GEMM can take them. The norms' weights are frozen. Gemma 4 norms v as well, which is not rotated.

Source: Su et al., "RoFormer", 2021, in both layouts of transformers' rotate_half.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from finetune_kernels.primitives import head_norm
from finetune_kernels.primitives.attention.inputs import Qkv
from finetune_kernels.primitives.head_norm import HeadNorm, _load_weights, _mean_products, _norm_backward
from finetune_kernels.primitives.precision import widen
from finetune_kernels.primitives.rotary_pairs import _load_cos_sin, _load_dq_dk, _load_dv, _pairs


@dataclass(frozen=True)
class Heads:
    """Heads of a row of q, k and v."""

    query: int
    """H."""
    key_value: int
    """H_kv; 0 where only q is made, and k and v are another layer's."""
    size: int
    """D, elements of a head."""
    pairs: bool = False
    """True if RoPE turns neighbours, the even and odd elements of a head, instead of its halves."""

    @property
    def rotated(self) -> int:
        """Number of heads of q and k, H + H_kv."""
        return self.query + self.key_value

    @property
    def width(self) -> int:
        """Elements of a row of q, k and v, (H + 2 H_kv) D."""
        return (self.rotated + self.key_value) * self.size

    def split(self, qkv: torch.Tensor) -> Qkv:
        """Returns views q [T, H, D], k and v [T, H_kv, D] of [T, width]."""
        by_head = qkv.view(qkv.shape[0], -1, self.size)
        q, k, v = torch.split(by_head, [self.query, self.key_value, self.key_value], dim=1)
        return Qkv(q, k, v)


def reference(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> torch.Tensor:
    """Returns q and k rotated, and v, [T, width], by the formula in fp32 or fp64, rounded once."""
    q, k, v = (widen(part) for part in heads.split(qkv))
    wq, wk = (None, None) if norm is None else (norm.query, norm.key)
    q, k = _turn(q, wq, cos, sin, heads, norm), _turn(k, wk, cos, sin, heads, norm)
    if norm is not None and norm.value:
        v = head_norm.reference(v, v.new_ones(heads.size), norm)
    return torch.cat((q, k, v), dim=1).flatten(1).to(qkv.dtype)


def _turn(
    x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, heads: Heads,
    norm: HeadNorm | None,
) -> torch.Tensor:  # fmt: skip
    """Returns q or k [T, H or H_kv, D], normed and rotated in the norm's order."""
    if norm is None or weight is None:
        return _rotate(x, cos, sin, heads)
    if norm.is_last:
        return head_norm.reference(_rotate(x, cos, sin, heads), weight, norm)
    return _rotate(head_norm.reference(x, weight, norm), cos, sin, heads)


def reference_backward(
    gradients: Qkv, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> torch.Tensor:
    """Returns what `backward` returns, by PyTorch: rotation by the opposite angle, and the norm's gradient."""
    *d_q_k, dv = (widen(gradient) for gradient in gradients)
    if norm is None:
        dq, dk = (_rotate(d, cos, -sin, heads) for d in d_q_k)
        return torch.cat((dq, dk, dv), dim=1).flatten(1).to(qkv.dtype)

    found = []
    for d, part, weight in zip(d_q_k, heads.split(qkv)[:2], (norm.query, norm.key), strict=True):
        x = widen(part)
        if norm.is_last:
            d = head_norm.reference_backward(d, _rotate(x, cos, sin, heads), weight, norm)
        d = _rotate(d, cos, -sin, heads)
        found.append(d if norm.is_last else head_norm.reference_backward(d, x, weight, norm))
    if norm.value:
        v = widen(heads.split(qkv).v)
        dv = head_norm.reference_backward(dv, v, v.new_ones(heads.size), norm)
    return torch.cat((*found, dv), dim=1).flatten(1).to(qkv.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Returns x [T, H, D] with its first R elements rotated by the angles of cos and sin [T, R]."""
    size = cos.shape[1]
    x, rest = x[..., :size], x[..., size:]
    c, s = (widen(part[:, : size // 2]).unsqueeze(1) for part in (cos, sin))  # [T, 1, R / 2]

    first, second = (x[..., ::2], x[..., 1::2]) if heads.pairs else (x[..., : size // 2], x[..., size // 2 :])
    turned = first * c - second * s, second * c + first * s
    rotated = torch.stack(turned, dim=-1).flatten(-2) if heads.pairs else torch.cat(turned, dim=-1)
    return torch.cat((rotated, rest), dim=-1)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, cos_ptr, sin_ptr, wq_ptr, wk_ptr, eps, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, NEXT: tl.constexpr, NORM: tl.constexpr,
    ROW: tl.constexpr, LAST: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """One row [T, width] a program, all heads at once."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    first, second, in_head, rotates = _pairs(D, R, BLOCK_D, NEXT)
    offsets = row * (H + 2 * H_KV) * D + head[:, None] * D
    offsets1, offsets2 = offsets + first[None, :], offsets + second[None, :]
    rotated = (head < H + H_KV)[:, None] & in_head
    v = ((head >= H + H_KV) & (head < H + 2 * H_KV))[:, None] & in_head
    if VALUE:
        rotated = rotated | v

    x1 = tl.load(x_ptr + offsets1, mask=rotated, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    x2 = tl.load(x_ptr + offsets2, mask=rotated, other=0.0).to(tl.float32)
    if NORM:
        w1 = _load_weights(wq_ptr, wk_ptr, head, first, in_head, H, H_KV, D, ROW, VALUE)
        w2 = _load_weights(wq_ptr, wk_ptr, head, second, in_head, H, H_KV, D, ROW, VALUE)
        if not LAST:
            rstd = tl.rsqrt(_mean_products(x1, x1, x2, x2, head, H, H_KV, D, ROW) + eps)
            x1 *= rstd * w1
            x2 *= rstd * w2

    c, s = _load_cos_sin(cos_ptr, sin_ptr, row, head, rotates, H, H_KV, R, BLOCK_D, VALUE)
    y1 = x1 * c - x2 * s
    y2 = x2 * c + x1 * s
    if LAST:
        rstd = tl.rsqrt(_mean_products(y1, y1, y2, y2, head, H, H_KV, D, ROW) + eps)
        y1 *= rstd * w1
        y2 *= rstd * w2
    tl.store(y_ptr + offsets1, y1, mask=rotated)
    tl.store(y_ptr + offsets2, y2, mask=rotated)

    if NORM and not VALUE:  # y is a buffer of its own: v is copied
        tl.store(y_ptr + offsets1, tl.load(x_ptr + offsets1, mask=v, other=0.0), mask=v)
        tl.store(y_ptr + offsets2, tl.load(x_ptr + offsets2, mask=v, other=0.0), mask=v)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dq_ptr, dk_ptr, dv_ptr, x_ptr, dx_ptr, cos_ptr, sin_ptr, wq_ptr, wk_ptr, eps, H: tl.constexpr, H_KV: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, NEXT: tl.constexpr,
    NORM: tl.constexpr, ROW: tl.constexpr, LAST: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """One row [T, width] a program, all heads at once."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    first, second, in_head, rotates = _pairs(D, R, BLOCK_D, NEXT)
    q = (head < H)[:, None] & in_head
    k = ((head >= H) & (head < H + H_KV))[:, None] & in_head
    v = ((head >= H + H_KV) & (head < H + 2 * H_KV))[:, None] & in_head
    offsets = row * (H + 2 * H_KV) * D + head[:, None] * D

    d1 = _load_dq_dk(dq_ptr, dk_ptr, row, head, first, q, k, H, H_KV, D)
    d2 = _load_dq_dk(dq_ptr, dk_ptr, row, head, second, q, k, H, H_KV, D)
    normed = q | k
    if VALUE:
        normed = normed | v
        d1 += _load_dv(dv_ptr, row, head, first, v, H, H_KV, D)
        d2 += _load_dv(dv_ptr, row, head, second, v, H, H_KV, D)
    c, s = _load_cos_sin(cos_ptr, sin_ptr, row, head, rotates, H, H_KV, R, BLOCK_D, VALUE)
    if NORM:
        x1 = tl.load(x_ptr + offsets + first[None, :], mask=normed, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + offsets + second[None, :], mask=normed, other=0.0).to(tl.float32)
        w1 = _load_weights(wq_ptr, wk_ptr, head, first, in_head, H, H_KV, D, ROW, VALUE)
        w2 = _load_weights(wq_ptr, wk_ptr, head, second, in_head, H, H_KV, D, ROW, VALUE)
        if LAST:
            y1, y2 = x1 * c - x2 * s, x2 * c + x1 * s
            d1, d2 = _norm_backward(d1, d2, y1, y2, w1, w2, head, eps, H, H_KV, D, ROW)

    # rotated back: by the opposite angle
    g1 = d1 * c + d2 * s
    g2 = d2 * c - d1 * s
    if NORM and not LAST:
        g1, g2 = _norm_backward(g1, g2, x1, x2, w1, w2, head, eps, H, H_KV, D, ROW)

    if not VALUE:  # v's gradient is copied; g1 and g2 are zero in its heads
        g1 += _load_dv(dv_ptr, row, head, first, v, H, H_KV, D)
        g2 += _load_dv(dv_ptr, row, head, second, v, H, H_KV, D)
    tl.store(dx_ptr + offsets + first[None, :], g1, mask=q | k | v)
    tl.store(dx_ptr + offsets + second[None, :], g2, mask=q | k | v)


def forward(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> torch.Tensor:
    """Returns q and k rotated, and v, [T, width].

    Without a head norm, `qkv` itself is rotated and returned; with one, it is left unchanged.
    """
    rotated, (q, k, eps) = torch.empty_like(qkv) if norm is not None else qkv, _norm_arguments(norm, cos)
    _forward[(qkv.shape[0],)](
        qkv, rotated, cos, sin, q, k, eps, **_sizes(heads, cos), **_flags(norm), num_warps=_warps(heads)
    )  # fmt: skip
    return rotated


def backward(
    gradients: Qkv, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> torch.Tensor:
    """Returns the gradient of `forward`'s input [T, width] from the gradients of q [T, H, D], k and v [T, H_kv, D].

    `qkv` is that input; it is only read if there is a head norm.
    """
    dq, dk, dv = (gradient.contiguous() for gradient in gradients)
    merged, (q, k, eps) = torch.empty_like(qkv), _norm_arguments(norm, cos)
    _backward[(qkv.shape[0],)](
        dq, dk, dv, qkv, merged, cos, sin, q, k, eps, **_sizes(heads, cos), **_flags(norm), num_warps=_warps(heads)
    )  # fmt: skip
    return merged


def _sizes(heads: Heads, cos: torch.Tensor) -> dict[str, int]:
    block_h = triton.next_power_of_2(heads.rotated + heads.key_value)
    block_d = triton.next_power_of_2(heads.size // 2)
    return {
        "H": heads.query, "H_KV": heads.key_value, "D": heads.size, "R": cos.shape[1], "BLOCK_H": block_h,
        "BLOCK_D": block_d, "NEXT": heads.pairs,
    }  # fmt: skip


def _warps(heads: Heads) -> int:
    """4 for heads of 128 elements in number as Llama's; a row of Gemma 4's, of 512, would not fit their registers."""
    elements = triton.next_power_of_2(heads.rotated + heads.key_value) * triton.next_power_of_2(heads.size)
    return 4 if elements <= 16384 else 8 if elements <= 32768 else 16


def _flags(norm: HeadNorm | None) -> dict[str, bool]:
    row, last, value = (False,) * 3 if norm is None else (norm.takes_rows, norm.is_last, norm.value)
    return {"NORM": norm is not None, "ROW": row, "LAST": last, "VALUE": value}


def _norm_arguments(norm: HeadNorm | None, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    return (unused, unused, 0.0) if norm is None else (norm.query, norm.key, norm.eps)


class RotaryEmbeddingFunction(torch.autograd.Function):
    """Autograd around the two kernels; saves cos and sin, and q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
    ) -> torch.Tensor:
        """See `rotary_embedding`."""
        qkv = qkv.contiguous()
        ctx.save_for_backward(qkv, cos, sin)
        ctx.heads, ctx.norm = heads, norm
        return forward(qkv.clone() if norm is None else qkv, cos, sin, heads, norm)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradient of `qkv`."""
        qkv, cos, sin = ctx.saved_tensors
        dx = backward(ctx.heads.split(dy.contiguous()), qkv, cos, sin, ctx.heads, ctx.norm)
        return dx, None, None, None, None


def rotary_embedding(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> torch.Tensor:
    """q and k rotated, and v, in a new tensor [T, width]; Triton on CUDA, the reference elsewhere."""
    if not qkv.is_cuda:
        return reference(qkv, cos, sin, heads, norm)
    return RotaryEmbeddingFunction.apply(qkv, cos, sin, heads, norm)  # type: ignore[no-untyped-call, no-any-return]
