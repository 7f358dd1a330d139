"""Gated activation between the MLP's merged projections, with the adapters' shares added on the way.

    g = gate + s_g i_g Bg^T,  u = up + s_u i_u Bu^T,  y = f(g) * u           i [T, r]: the input times A^T
    dy' = dy + d A,  dg = dy' * u * f'(g),  du = dy' * f(g)                  d A: the share of the adapter after it

A product of rank 16 costs nothing while a tile is in registers, but a pass of its own over [T, F] is 2 F T bytes read
and written: three such passes are saved, one rounding each. The activations come out of backward again, so that they
need not be kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from finetune_kernels.ops import gated_activation
from finetune_kernels.ops.gated_activation import Activation, _activate
from finetune_kernels.primitives.precision import widen

BLOCK_T, TILES = 32, 8
"""Rows of a tile, and tiles of rows that one program takes: it reads the adapters once for all of them."""
MAX_RANK = 64
"""LoraDeltas of larger adapters are cheaper as products of their own."""


@dataclass(frozen=True)
class LoraDelta:
    """What an adapter adds to one of the projections: scale * inner @ b^T."""

    inner: torch.Tensor
    """[T, r], rows may be strided."""
    b: torch.Tensor
    """[F, r], contiguous."""
    scale: float


LoraDeltas = tuple[LoraDelta | None, LoraDelta | None]


def reference(gate_up: torch.Tensor, activation: Activation, shares: LoraDeltas) -> torch.Tensor:
    """The forward formula in fp32 or fp64: gate_up [T, 2 F] -> [T, F]."""
    return gated_activation.reference(*_adapted(gate_up, shares), activation).to(gate_up.dtype)


def reference_backward(
    dy: torch.Tensor,
    gate_up: torch.Tensor,
    activation: Activation,
    shares: LoraDeltas,
    after: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """`backward` by PyTorch; it overwrites `dy` as well."""
    g, u = _adapted(gate_up, shares)
    whole = widen(dy) if after is None else widen(dy) + widen(after[0]) @ widen(after[1])
    gradients = gated_activation.reference_backward(whole, g, u, activation)
    dy.copy_(gated_activation.reference(g, u, activation))
    return torch.cat(gradients, dim=1).to(gate_up.dtype)


def _adapted(gate_up: torch.Tensor, shares: LoraDeltas) -> tuple[torch.Tensor, torch.Tensor]:
    """g and u [T, F], wide."""
    halves = []
    for half, share in zip(widen(gate_up).chunk(2, dim=1), shares, strict=True):
        halves.append(half if share is None else half + share.scale * widen(share.inner) @ widen(share.b).T)
    return halves[0], halves[1]


@triton.jit
def _adapter(b_ptr, columns, f, stride_c, stride_r, R: tl.constexpr, R_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the columns' adapter multiplies by, [R, F]."""
    rank = tl.arange(0, R_PAD)
    inside = (rank < R)[:, None] & (columns < f)[None, :]
    return tl.load(b_ptr + columns[None, :] * stride_c + rank.to(tl.int64)[:, None] * stride_r, mask=inside, other=0.0)


@triton.jit
def _share(rows, inner_ptr, stride, b, R: tl.constexpr, R_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """inner @ b of one tile, in fp32."""
    rank = tl.arange(0, R_PAD)
    i = tl.load(inner_ptr + rows[:, None] * stride + rank[None, :], mask=(rank < R)[None, :], other=0.0)
    return tl.dot(i, b)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    gu_ptr, y_ptr, t, f, ig_ptr, bg_ptr, stride_g, scale_g, iu_ptr, bu_ptr, stride_u, scale_u,
    RG: tl.constexpr, RG_PAD: tl.constexpr, RU: tl.constexpr, RU_PAD: tl.constexpr, GELU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    first, columns = tl.program_id(0) * BLOCK_T * TILES, tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if RG:
        bg = _adapter(bg_ptr, columns, f, RG, 1, RG, RG_PAD)
    if RU:
        bu = _adapter(bu_ptr, columns, f, RU, 1, RU, RU_PAD)
    for start in tl.range(first, tl.minimum(first + BLOCK_T * TILES, t), BLOCK_T, num_stages=3):
        rows = start + tl.arange(0, BLOCK_T)
        inside = (rows < t)[:, None] & (columns < f)[None, :]
        rows = tl.minimum(rows, t - 1).to(tl.int64)
        at = rows[:, None] * 2 * f + columns[None, :]
        g = tl.load(gu_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(gu_ptr + at + f, mask=inside, other=0.0).to(tl.float32)
        if RG:
            g += scale_g * _share(rows, ig_ptr, stride_g, bg, RG, RG_PAD)
        if RU:
            u += scale_u * _share(rows, iu_ptr, stride_u, bu, RU, RU_PAD)
        value, _ = _activate(g, GELU)
        tl.store(y_ptr + rows[:, None] * f + columns[None, :], value * u, mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dy_ptr, gu_ptr, dgu_ptr, t, f, ig_ptr, bg_ptr, stride_g, scale_g, iu_ptr, bu_ptr, stride_u, scale_u,
    d_ptr, a_ptr, stride_d, RD: tl.constexpr, RD_PAD: tl.constexpr,
    RG: tl.constexpr, RG_PAD: tl.constexpr, RU: tl.constexpr, RU_PAD: tl.constexpr, GELU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    first, columns = tl.program_id(0) * BLOCK_T * TILES, tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if RG:
        bg = _adapter(bg_ptr, columns, f, RG, 1, RG, RG_PAD)
    if RU:
        bu = _adapter(bu_ptr, columns, f, RU, 1, RU, RU_PAD)
    if RD:
        a = _adapter(a_ptr, columns, f, 1, f, RD, RD_PAD)
    for start in tl.range(first, tl.minimum(first + BLOCK_T * TILES, t), BLOCK_T, num_stages=3):
        rows = start + tl.arange(0, BLOCK_T)
        inside = (rows < t)[:, None] & (columns < f)[None, :]
        rows = tl.minimum(rows, t - 1).to(tl.int64)
        at = rows[:, None] * 2 * f + columns[None, :]
        to = rows[:, None] * f + columns[None, :]
        g = tl.load(gu_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(gu_ptr + at + f, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + to, mask=inside, other=0.0).to(tl.float32)
        if RG:
            g += scale_g * _share(rows, ig_ptr, stride_g, bg, RG, RG_PAD)
        if RU:
            u += scale_u * _share(rows, iu_ptr, stride_u, bu, RU, RU_PAD)
        if RD:
            dy += _share(rows, d_ptr, stride_d, a, RD, RD_PAD)
        value, derivative = _activate(g, GELU)
        tl.store(dgu_ptr + at, dy * u * derivative, mask=inside)
        tl.store(dgu_ptr + at + f, dy * value, mask=inside)
        tl.store(dy_ptr + to, value * u, mask=inside)


def _arguments(share: LoraDelta | None, unused: torch.Tensor) -> tuple[Any, ...]:
    if share is None:
        return unused, unused, 0, 0.0
    return share.inner, share.b, share.inner.stride(0), share.scale


def launch(
    kernel: Any, size: tuple[int, int], arguments: tuple[Any, ...], ranks: dict[str, int], activation: Activation
) -> None:
    """Run `kernel` over `size`, [T, F], for adapters of `ranks`, by the names that it gives them."""
    # the fastest on an H200 of those that 99 KiB of shared memory (Ada) are enough for
    columns, warps = (128, 8) if max(ranks.values()) <= MAX_RANK // 2 else (64, 4)
    padded = {f"{name}_PAD": max(16, triton.next_power_of_2(rank)) for name, rank in ranks.items()}
    kernel[(triton.cdiv(size[0], BLOCK_T * TILES), triton.cdiv(size[1], columns))](
        *arguments, **ranks, **padded, GELU=activation == "gelu_tanh", BLOCK_T=BLOCK_T, BLOCK_F=columns, TILES=TILES,
        num_warps=warps,
    )  # fmt: skip


def _ranks(shares: LoraDeltas) -> dict[str, int]:
    gate, up = (0 if share is None else share.b.shape[1] for share in shares)
    return {"RG": gate, "RU": up}


def forward(gate_up: torch.Tensor, activation: Activation, shares: LoraDeltas) -> torch.Tensor:
    """See `reference`."""
    t, f = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(t, f)
    arguments = gate_up, y, t, f, *_arguments(shares[0], y), *_arguments(shares[1], y)
    launch(_forward, (t, f), arguments, _ranks(shares), activation)
    return y


def backward(
    dy: torch.Tensor,
    gate_up: torch.Tensor,
    activation: Activation,
    shares: LoraDeltas,
    after: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Gradient of `gate_up` [T, 2 F]; the same is that of g and u. `after`: d [T, r] and A [r, F] of the adapter that
    follows, whose share `dy` [T, F] lacks. `dy` is overwritten by the activations."""
    t, f = dy.shape
    gradient = torch.empty_like(gate_up)
    d, a = (dy, dy) if after is None else after
    arguments = dy, gate_up, gradient, t, f, *_arguments(shares[0], dy), *_arguments(shares[1], dy), d, a, d.stride(0)
    ranks = _ranks(shares) | {"RD": 0 if after is None else a.shape[0]}
    launch(_backward, (t, f), arguments, ranks, activation)
    return gradient
