"""Rotary position embedding of q and k in one launch, with the head norm of Qwen3 and Gemma 3 where the model has one.

    x = [x1, x2] (halves of a head),   n = x * r * w, r = 1 / sqrt(mean(x^2) + eps)   (n = x without a head norm)
    y1 = n1 cos - n2 sin,   y2 = n2 cos + n1 sin

Where cos and sin are shorter than a head (Phi-4-mini), x1 and x2 are the halves of its first R elements, and the rest
stays as it is.

q, k and v lie side by side in one buffer, as the merged projection makes them: [T, (H + 2 H_kv) D]. Backward takes the
three gradients as attention gives them, rotates back, and lays them side by side again, v included, so that one GEMM
can take them all. The norms' weights are frozen.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from finetune_kernels.ops import rms_norm
from finetune_kernels.primitives.precision import widen


@dataclass(frozen=True)
class HeadNorm:
    """The root mean square norm of each head before rotation; weights [D] (Gemma's one is added)."""

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
    """The formula in fp32 or fp64, rounded once: qkv [T, width], cos and sin [T, R] (equal halves) -> [T, width]."""
    q, k, v = (widen(part) for part in heads.split(qkv))
    if norm is not None:
        q = rms_norm.reference(q, norm.query, norm.eps)
        k = rms_norm.reference(k, norm.key, norm.eps)
    return torch.cat((_turn(q, cos, sin), _turn(k, cos, sin), v), dim=1).flatten(1).to(qkv.dtype)


def reference_backward(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Heads,
    norm: HeadNorm | None,
) -> torch.Tensor:
    """`rotate_back` by PyTorch: a turn by the opposite angle, then the head norm's gradient."""
    dq, dk, dv = (widen(gradient) for gradient in gradients)
    dq, dk = _turn(dq, cos, -sin), _turn(dk, cos, -sin)
    if norm is not None:
        q, k, _ = (widen(part) for part in heads.split(qkv))
        dq = _norm_backward(dq, q, norm.query, norm.eps)
        dk = _norm_backward(dk, k, norm.key, norm.eps)
    return torch.cat((dq, dk, dv), dim=1).flatten(1).to(qkv.dtype)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] by the angles [T, R]."""
    x, still = x[..., : cos.shape[1]], x[..., cos.shape[1] :]
    first, second = x.chunk(2, dim=-1)
    turned = x * widen(cos).unsqueeze(1) + torch.cat((-second, first), dim=-1) * widen(sin).unsqueeze(1)
    return torch.cat((turned, still), dim=-1)


def _norm_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    _, _, scales = rms_norm.reference_forward(x, weight, eps)
    return rms_norm.reference_backward(dy, x, weight, scales)[0]


@triton.jit
def _places(D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs of elements of a head: where both lie, whether they exist, and whether they turn. Elements that do not
    turn are paired by halves too, so that one pass takes all."""
    half = tl.arange(0, BLOCK_D)
    first, second = half, half + D // 2
    if R != D:
        first = tl.where(half < R // 2, half, half + R // 2)
        second = first + tl.where(half < R // 2, R // 2, (D - R) // 2)
    return first, second, (half < D // 2)[None, :], half < R // 2


@triton.jit
def _load_weights(wq_ptr, wk_ptr, head, at, inside, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """Norm weights of elements `at` of each head: q's or k's."""
    q = tl.load(wq_ptr + at[None, :], mask=inside, other=0.0).to(tl.float32)
    k = tl.load(wk_ptr + at[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where(head[:, None] < H, q, k)


@triton.jit
def _angles(cos_ptr, sin_ptr, row, turns, R: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """cos and sin of each pair; 1 and 0 where it does not turn."""
    half = tl.arange(0, BLOCK_D)
    c = tl.load(cos_ptr + row * R + half, mask=turns, other=1.0)[None, :].to(tl.float32)
    s = tl.load(sin_ptr + row * R + half, mask=turns, other=0.0)[None, :].to(tl.float32)
    return c, s


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, cos_ptr, sin_ptr, wq_ptr, wk_ptr, eps, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    first, second, inside, turns = _places(D, R, BLOCK_D)
    at = row * (H + 2 * H_KV) * D + head[:, None] * D
    at1, at2 = at + first[None, :], at + second[None, :]
    rotated = (head < H + H_KV)[:, None] & inside
    x1 = tl.load(x_ptr + at1, mask=rotated, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + at2, mask=rotated, other=0.0).to(tl.float32)
    if NORM:
        r = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)[:, None]
        x1 *= r * _load_weights(wq_ptr, wk_ptr, head, first, inside, H)
        x2 *= r * _load_weights(wq_ptr, wk_ptr, head, second, inside, H)
    c, s = _angles(cos_ptr, sin_ptr, row, turns, R, BLOCK_D)
    tl.store(y_ptr + at1, x1 * c - x2 * s, mask=rotated)
    tl.store(y_ptr + at2, x2 * c + x1 * s, mask=rotated)
    if NORM:
        v = ((head >= H + H_KV) & (head < H + 2 * H_KV))[:, None] & inside
        tl.store(y_ptr + at1, tl.load(x_ptr + at1, mask=v, other=0.0), mask=v)
        tl.store(y_ptr + at2, tl.load(x_ptr + at2, mask=v, other=0.0), mask=v)


@triton.jit
def _load_both(dq_ptr, dk_ptr, row, head, at, q, k, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements `at` of the gradients of q's and k's heads."""
    d = tl.load(dq_ptr + row * H * D + head[:, None] * D + at[None, :], mask=q, other=0.0).to(tl.float32)
    to = row * H_KV * D + (head - H)[:, None] * D + at[None, :]
    return d + tl.load(dk_ptr + to, mask=k, other=0.0).to(tl.float32)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dq_ptr, dk_ptr, dv_ptr, x_ptr, dx_ptr, cos_ptr, sin_ptr, wq_ptr, wk_ptr, eps, H: tl.constexpr, H_KV: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    first, second, inside, turns = _places(D, R, BLOCK_D)
    q = (head < H)[:, None] & inside
    k = ((head >= H) & (head < H + H_KV))[:, None] & inside
    v = ((head >= H + H_KV) & (head < H + 2 * H_KV))[:, None] & inside
    at = row * (H + 2 * H_KV) * D + head[:, None] * D
    d1 = _load_both(dq_ptr, dk_ptr, row, head, first, q, k, H, H_KV, D)
    d2 = _load_both(dq_ptr, dk_ptr, row, head, second, q, k, H, H_KV, D)
    c, s = _angles(cos_ptr, sin_ptr, row, turns, R, BLOCK_D)
    g1 = d1 * c + d2 * s
    g2 = d2 * c - d1 * s
    if NORM:
        x1 = tl.load(x_ptr + at + first[None, :], mask=q | k, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + at + second[None, :], mask=q | k, other=0.0).to(tl.float32)
        r = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)[:, None]
        g1 *= _load_weights(wq_ptr, wk_ptr, head, first, inside, H)
        g2 *= _load_weights(wq_ptr, wk_ptr, head, second, inside, H)
        mean = ((tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1)) / D)[:, None]
        g1 = r * (g1 - x1 * r * r * mean)
        g2 = r * (g2 - x2 * r * r * mean)
    at_v = row * H_KV * D + (head - H - H_KV)[:, None] * D
    g1 += tl.load(dv_ptr + at_v + first[None, :], mask=v, other=0.0).to(tl.float32)
    g2 += tl.load(dv_ptr + at_v + second[None, :], mask=v, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at + first[None, :], g1, mask=q | k | v)
    tl.store(dx_ptr + at + second[None, :], g2, mask=q | k | v)


def rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> torch.Tensor:
    """See `reference`. Without a head norm `qkv` itself is rotated and returned; with one it is left as it is."""
    rotated = torch.empty_like(qkv) if norm is not None else qkv
    q, k, eps = _norm_arguments(norm, cos)
    _forward[(qkv.shape[0],)](
        qkv, rotated, cos, sin, q, k, eps, **_sizes(heads, cos), NORM=norm is not None, num_warps=4
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
