"""Rotary position embedding of q and k in one launch, with the head norm of Qwen3 and Gemma 3 where the model has one.

    x = [x1, x2] (halves of a head),   n = x * rstd * w, rstd = 1 / sqrt(mean(x^2) + eps)   (n = x without a head norm)
    y1 = n1 cos - n2 sin,   y2 = n2 cos + n1 sin

If cos and sin are shorter than a head (Phi-4-mini), x1 and x2 are the halves of its first R elements, and the rest is
left unchanged.

Shapes: q, k and v lie side by side in one buffer, as the merged projection writes them, [T, (H + 2 H_kv) D]; cos and
sin are [T, R] of any float type, with equal halves. Arithmetic is fp32, rounded once. Backward takes the gradients as
attention returns them, rotates q's and k's by the opposite angle, and lays all three side by side again, so that one
GEMM can take them. The norms' weights are frozen.

Source: Su et al., "RoFormer", 2021, in the layout of halves that transformers' rotate_half has; the head norm: Henry et
al., "Query-Key Normalization for Transformers", 2020.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from finetune_kernels.ops import rms_norm
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.primitives.attention_inputs import Qkv
from finetune_kernels.primitives.precision import widen


@dataclass(frozen=True)
class HeadNorm:
    """The RMS norm of each head before rotation; weights [D], to which Gemma's offset of 1 has been added."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Heads:
    """Heads of a row of q, k and v."""

    query: int
    """H."""
    key_value: int
    """H_kv."""
    size: int
    """D, elements of a head."""

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
    if norm is not None:
        q = rms_norm.reference(q, Norm(norm.query, norm.eps))
        k = rms_norm.reference(k, Norm(norm.key, norm.eps))
    return torch.cat((_rotate(q, cos, sin), _rotate(k, cos, sin), v), dim=1).flatten(1).to(qkv.dtype)


def reference_backward(
    gradients: Qkv, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> torch.Tensor:
    """Returns what `backward` returns, by PyTorch: rotation by the opposite angle, then the head norm's gradient."""
    dq, dk, dv = (widen(gradient) for gradient in gradients)
    dq, dk = _rotate(dq, cos, -sin), _rotate(dk, cos, -sin)
    if norm is not None:
        q, k, _ = (widen(part) for part in heads.split(qkv))
        dq = _norm_backward(dq, q, Norm(norm.query, norm.eps))
        dk = _norm_backward(dk, k, Norm(norm.key, norm.eps))
    return torch.cat((dq, dk, dv), dim=1).flatten(1).to(qkv.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns x [T, H, D] with its first R elements rotated by the angles of cos and sin [T, R]."""
    x, rest = x[..., : cos.shape[1]], x[..., cos.shape[1] :]
    first, second = x.chunk(2, dim=-1)
    rotated = x * widen(cos).unsqueeze(1) + torch.cat((-second, first), dim=-1) * widen(sin).unsqueeze(1)
    return torch.cat((rotated, rest), dim=-1)


def _norm_backward(dy: torch.Tensor, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    _, _, rstd = rms_norm.reference_forward(x, norm)
    return rms_norm.reference_backward(dy, x, norm, rstd)[0]


@triton.jit
def _pairs(D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs of elements of a head: the offsets of both, whether they exist, and whether they are rotated. Elements that
    are not rotated are paired by halves too, so that one pass takes all."""
    pair = tl.arange(0, BLOCK_D)
    first, second = pair, pair + D // 2
    if R != D:
        first = tl.where(pair < R // 2, pair, pair + R // 2)
        second = first + tl.where(pair < R // 2, R // 2, (D - R) // 2)
    return first, second, (pair < D // 2)[None, :], pair < R // 2


@triton.jit
def _load_weights(wq_ptr, wk_ptr, head, offsets, mask, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """Norm weights of the elements `offsets` of each head, q's or k's, [BLOCK_H, BLOCK_D]."""
    q = tl.load(wq_ptr + offsets[None, :], mask=mask, other=0.0).to(tl.float32)
    k = tl.load(wk_ptr + offsets[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(head[:, None] < H, q, k)


@triton.jit
def _load_cos_sin(cos_ptr, sin_ptr, row, rotates, R: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """cos and sin of each pair, [1, BLOCK_D]; 1 and 0 where it is not rotated."""
    pair = tl.arange(0, BLOCK_D)
    c = tl.load(cos_ptr + row * R + pair, mask=rotates, other=1.0)[None, :].to(tl.float32)
    s = tl.load(sin_ptr + row * R + pair, mask=rotates, other=0.0)[None, :].to(tl.float32)
    return c, s


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, cos_ptr, sin_ptr, wq_ptr, wk_ptr, eps, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One row [T, width] a program, all heads at once."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    first, second, in_head, rotates = _pairs(D, R, BLOCK_D)
    offsets = row * (H + 2 * H_KV) * D + head[:, None] * D
    offsets1, offsets2 = offsets + first[None, :], offsets + second[None, :]
    rotated = (head < H + H_KV)[:, None] & in_head

    x1 = tl.load(x_ptr + offsets1, mask=rotated, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    x2 = tl.load(x_ptr + offsets2, mask=rotated, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)[:, None]
        x1 *= rstd * _load_weights(wq_ptr, wk_ptr, head, first, in_head, H)
        x2 *= rstd * _load_weights(wq_ptr, wk_ptr, head, second, in_head, H)

    c, s = _load_cos_sin(cos_ptr, sin_ptr, row, rotates, R, BLOCK_D)
    tl.store(y_ptr + offsets1, x1 * c - x2 * s, mask=rotated)
    tl.store(y_ptr + offsets2, x2 * c + x1 * s, mask=rotated)

    if NORM:  # y is a buffer of its own: v is copied
        v = ((head >= H + H_KV) & (head < H + 2 * H_KV))[:, None] & in_head
        tl.store(y_ptr + offsets1, tl.load(x_ptr + offsets1, mask=v, other=0.0), mask=v)
        tl.store(y_ptr + offsets2, tl.load(x_ptr + offsets2, mask=v, other=0.0), mask=v)


@triton.jit
def _load_dq_dk(dq_ptr, dk_ptr, row, head, offsets, q, k, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements `offsets` of the gradients of q's and k's heads, [BLOCK_H, BLOCK_D]."""
    d = tl.load(dq_ptr + row * H * D + head[:, None] * D + offsets[None, :], mask=q, other=0.0).to(tl.float32)
    offsets_k = row * H_KV * D + (head - H)[:, None] * D + offsets[None, :]
    return d + tl.load(dk_ptr + offsets_k, mask=k, other=0.0).to(tl.float32)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dq_ptr, dk_ptr, dv_ptr, x_ptr, dx_ptr, cos_ptr, sin_ptr, wq_ptr, wk_ptr, eps, H: tl.constexpr, H_KV: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One row [T, width] a program, all heads at once."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    first, second, in_head, rotates = _pairs(D, R, BLOCK_D)
    q = (head < H)[:, None] & in_head
    k = ((head >= H) & (head < H + H_KV))[:, None] & in_head
    v = ((head >= H + H_KV) & (head < H + 2 * H_KV))[:, None] & in_head
    offsets = row * (H + 2 * H_KV) * D + head[:, None] * D

    # rotated back: by the opposite angle
    d1 = _load_dq_dk(dq_ptr, dk_ptr, row, head, first, q, k, H, H_KV, D)
    d2 = _load_dq_dk(dq_ptr, dk_ptr, row, head, second, q, k, H, H_KV, D)
    c, s = _load_cos_sin(cos_ptr, sin_ptr, row, rotates, R, BLOCK_D)
    g1 = d1 * c + d2 * s
    g2 = d2 * c - d1 * s

    if NORM:
        x1 = tl.load(x_ptr + offsets + first[None, :], mask=q | k, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + offsets + second[None, :], mask=q | k, other=0.0).to(tl.float32)
        rstd = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)[:, None]
        g1 *= _load_weights(wq_ptr, wk_ptr, head, first, in_head, H)
        g2 *= _load_weights(wq_ptr, wk_ptr, head, second, in_head, H)
        mean = ((tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1)) / D)[:, None]
        g1 = rstd * (g1 - x1 * rstd * rstd * mean)
        g2 = rstd * (g2 - x2 * rstd * rstd * mean)

    # v's gradient is copied; g1 and g2 are zero in its heads
    offsets_v = row * H_KV * D + (head - H - H_KV)[:, None] * D
    g1 += tl.load(dv_ptr + offsets_v + first[None, :], mask=v, other=0.0).to(tl.float32)
    g2 += tl.load(dv_ptr + offsets_v + second[None, :], mask=v, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets + first[None, :], g1, mask=q | k | v)
    tl.store(dx_ptr + offsets + second[None, :], g2, mask=q | k | v)


def forward(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> torch.Tensor:
    """Returns q and k rotated, and v, [T, width].

    Without a head norm, `qkv` itself is rotated and returned; with one, it is left unchanged.
    """
    rotated = torch.empty_like(qkv) if norm is not None else qkv
    q, k, eps = _norm_arguments(norm, cos)
    _forward[(qkv.shape[0],)](
        qkv, rotated, cos, sin, q, k, eps, **_sizes(heads, cos), NORM=norm is not None, num_warps=4
    )  # fmt: skip
    return rotated


def backward(
    gradients: Qkv, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> torch.Tensor:
    """Returns the gradient of `forward`'s input [T, width] from the gradients of q [T, H, D], k and v [T, H_kv, D].

    `qkv` is that input; it is only read if there is a head norm.
    """
    dq, dk, dv = (gradient.contiguous() for gradient in gradients)
    merged = torch.empty_like(qkv)
    q, k, eps = _norm_arguments(norm, cos)
    _backward[(qkv.shape[0],)](
        dq, dk, dv, qkv, merged, cos, sin, q, k, eps, **_sizes(heads, cos), NORM=norm is not None, num_warps=4
    )  # fmt: skip
    return merged


def _sizes(heads: Heads, cos: torch.Tensor) -> dict[str, int]:
    block_h = triton.next_power_of_2(heads.rotated + heads.key_value)
    block_d = triton.next_power_of_2(heads.size // 2)
    return {
        "H": heads.query, "H_KV": heads.key_value, "D": heads.size, "R": cos.shape[1], "BLOCK_H": block_h,
        "BLOCK_D": block_d,
    }  # fmt: skip


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
