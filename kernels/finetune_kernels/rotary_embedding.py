"""Rotary position embedding of q and k in one launch, with the head norm of Qwen3 where the model has one.

    x = [x1, x2] (halves of a head),   n = x * r * w, r = 1 / sqrt(mean(x^2) + eps)   (n = x without a head norm)
    y1 = n1 cos - n2 sin,   y2 = n2 cos + n1 sin

q, k and v lie side by side in one buffer, as the merged projection makes them: [T, (H + 2 H_kv) D]. Backward takes the
three gradients as attention gives them, rotates back, and lays them side by side again, v included, so that one GEMM
can take them all. The norms' weights are frozen.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class HeadNorm:
    """The root mean square norm of each head before rotation; weights [D]."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Heads:
    """How a row of q, k and v is made up."""

    query: int
    key_value: int
    size: int

    @property
    def rotated(self) -> int:
        """Heads of q and k."""
        return self.query + self.key_value

    @property
    def width(self) -> int:
        """Elements of a row of q, k and v."""
        return (self.rotated + self.key_value) * self.size

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, width] -> views q [T, H, D], k and v [T, H_kv, D]."""
        by_head = qkv.view(qkv.shape[0], -1, self.size)
        q, k, v = torch.split(by_head, [self.query, self.key_value, self.key_value], dim=1)
        return q, k, v


def reference(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> torch.Tensor:
    """The formula in fp32, rounded once: qkv [T, width], cos and sin [T, D] (equal halves) -> [T, width]."""
    q, k, v = (part.float() for part in heads.split(qkv))
    if norm is not None:
        q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.query.float()
        k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.key.float()
    c, s = cos.float().unsqueeze(1), sin.float().unsqueeze(1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * c + torch.cat((-second, first), dim=-1) * s

    return torch.cat((rotate(q), rotate(k), v), dim=1).flatten(1).to(qkv.dtype)


@triton.jit
def _load_weights(wq_ptr, wk_ptr, head, half, H: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of each head's norm weights: q's or k's."""
    q = head[:, None] < H
    first = tl.where(q, tl.load(wq_ptr + half)[None, :].to(tl.float32), tl.load(wk_ptr + half)[None, :].to(tl.float32))
    at = half + D // 2
    second = tl.where(q, tl.load(wq_ptr + at)[None, :].to(tl.float32), tl.load(wk_ptr + at)[None, :].to(tl.float32))
    return first, second


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, cos_ptr, sin_ptr, wq_ptr, wk_ptr, eps,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    half = tl.arange(0, D // 2)
    at = row * (H + 2 * H_KV) * D + head[:, None] * D + half[None, :]
    rotated = (head < H + H_KV)[:, None]
    x1 = tl.load(x_ptr + at, mask=rotated, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + at + D // 2, mask=rotated, other=0.0).to(tl.float32)
    if NORM:
        w1, w2 = _load_weights(wq_ptr, wk_ptr, head, half, H, D)
        r = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)[:, None]
        x1 = x1 * r * w1
        x2 = x2 * r * w2
    c = tl.load(cos_ptr + row * D + half)[None, :].to(tl.float32)
    s = tl.load(sin_ptr + row * D + half)[None, :].to(tl.float32)
    tl.store(y_ptr + at, x1 * c - x2 * s, mask=rotated)
    tl.store(y_ptr + at + D // 2, x2 * c + x1 * s, mask=rotated)
    if NORM:
        v = ((head >= H + H_KV) & (head < H + 2 * H_KV))[:, None]
        tl.store(y_ptr + at, tl.load(x_ptr + at, mask=v, other=0.0), mask=v)
        tl.store(y_ptr + at + D // 2, tl.load(x_ptr + at + D // 2, mask=v, other=0.0), mask=v)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dq_ptr, dk_ptr, dv_ptr, x_ptr, dx_ptr, cos_ptr, sin_ptr, wq_ptr, wk_ptr, eps,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    half = tl.arange(0, D // 2)
    q = (head < H)[:, None]
    k = ((head >= H) & (head < H + H_KV))[:, None]
    v = ((head >= H + H_KV) & (head < H + 2 * H_KV))[:, None]
    at_q = row * H * D + head[:, None] * D + half[None, :]
    at_k = row * H_KV * D + (head - H)[:, None] * D + half[None, :]
    at_v = at_k - H_KV * D
    at = row * (H + 2 * H_KV) * D + head[:, None] * D + half[None, :]
    d1 = tl.load(dq_ptr + at_q, mask=q, other=0.0).to(tl.float32)
    d1 += tl.load(dk_ptr + at_k, mask=k, other=0.0).to(tl.float32)
    d2 = tl.load(dq_ptr + at_q + D // 2, mask=q, other=0.0).to(tl.float32)
    d2 += tl.load(dk_ptr + at_k + D // 2, mask=k, other=0.0).to(tl.float32)
    c = tl.load(cos_ptr + row * D + half)[None, :].to(tl.float32)
    s = tl.load(sin_ptr + row * D + half)[None, :].to(tl.float32)
    g1 = d1 * c + d2 * s
    g2 = d2 * c - d1 * s
    if NORM:
        w1, w2 = _load_weights(wq_ptr, wk_ptr, head, half, H, D)
        x1 = tl.load(x_ptr + at, mask=q | k, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + at + D // 2, mask=q | k, other=0.0).to(tl.float32)
        r = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)[:, None]
        g1 *= w1
        g2 *= w2
        mean = ((tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1)) / D)[:, None]
        g1 = r * (g1 - x1 * r * r * mean)
        g2 = r * (g2 - x2 * r * r * mean)
    g1 += tl.load(dv_ptr + at_v, mask=v, other=0.0).to(tl.float32)
    g2 += tl.load(dv_ptr + at_v + D // 2, mask=v, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, g1, mask=q | k | v)
    tl.store(dx_ptr + at + D // 2, g2, mask=q | k | v)


def rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> torch.Tensor:
    """See `reference`. Without a head norm `qkv` itself is rotated and returned; with one it is left as it is."""
    rotated = torch.empty_like(qkv) if norm is not None else qkv
    q, k, eps = _norm_arguments(norm, cos)
    _forward[(qkv.shape[0],)](
        qkv, rotated, cos, sin, q, k, eps, H=heads.query, H_KV=heads.key_value, D=heads.size,
        BLOCK_H=triton.next_power_of_2(heads.rotated + heads.key_value), NORM=norm is not None, num_warps=4,
    )  # fmt: skip
    return rotated


def rotate_back(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Heads,
    norm: HeadNorm | None,
) -> torch.Tensor:
    """Gradient of `rotate`'s input, [T, width], from those of q [T, H, D], k and v [T, H_kv, D]; `qkv` is that input
    (only read where there is a head norm)."""
    dq, dk, dv = (gradient.contiguous() for gradient in gradients)
    merged = torch.empty_like(qkv)
    q, k, eps = _norm_arguments(norm, cos)
    _backward[(qkv.shape[0],)](
        dq, dk, dv, qkv, merged, cos, sin, q, k, eps, H=heads.query, H_KV=heads.key_value, D=heads.size,
        BLOCK_H=triton.next_power_of_2(heads.rotated + heads.key_value), NORM=norm is not None, num_warps=4,
    )  # fmt: skip
    return merged


def _norm_arguments(norm: HeadNorm | None, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    return (unused, unused, 0.0) if norm is None else (norm.query, norm.key, norm.eps)
