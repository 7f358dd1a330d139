"""Gated activation between the MLP's merged projections, with the adapters' LoRA deltas added on the way.

    g   = gate + s_g xa_g Bg^T,       u  = up + s_u xa_u Bu^T,       y  = f(g) * u
    dy' = dy + d_xa A,                dg = dy' * u * f'(g),          du = dy' * f(g)

Shapes: gate and up side by side [T, 2 F]; xa = x A^T [T, r] and B [F, r] of the gate's and the up projection's adapter;
d_xa [T, r] and A [r, F] of the adapter of the projection that follows, whose part of the gradient is missing in `dy`
[T, F]. Inputs are of one float type; sums are fp32 and rounded once.

A product of rank 16 costs nothing while a tile is in registers, but a pass of its own over [T, F] is 2 F T bytes read
and written: three such passes are saved, one rounding each. Backward writes the activations once more, so that they
need not be saved.

Source: Shazeer, "GLU Variants Improve Transformer", 2020 (SwiGLU, GeGLU); Hu et al., "LoRA", 2021. The fusion is ours.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from finetune_kernels.ops import gated_activation
from finetune_kernels.ops.gated_activation import Activation, _activate
from finetune_kernels.primitives.lora_delta import LoraDelta
from finetune_kernels.primitives.precision import before_ampere, widen

BLOCK_T, TILES = 32, 8
"""Rows of a tile, and tiles of rows that one program takes: it reads the adapters once for all of them."""
MAX_RANK = 64
"""Largest rank that the kernels take; deltas of larger adapters are cheaper as products of their own."""

LoraDeltas = tuple[LoraDelta | None, LoraDelta | None]
"""The gate's delta and the up projection's; None without an adapter."""
LoraDx = tuple[torch.Tensor, torch.Tensor]
"""d_xa [T, r] and A [r, F] of the adapter of the down projection."""


def reference(gate_up: torch.Tensor, activation: Activation, deltas: LoraDeltas) -> torch.Tensor:
    """Returns y [T, F] by the formula in fp32 or fp64, rounded to the dtype of `gate_up` [T, 2 F]."""
    return gated_activation.reference(*_adapted(gate_up, deltas), activation).to(gate_up.dtype)


def reference_backward(
    dy: torch.Tensor, gate_up: torch.Tensor, activation: Activation, deltas: LoraDeltas, lora_dx: LoraDx | None
) -> torch.Tensor:
    """Returns what `backward` returns, by PyTorch, and overwrites `dy` as well."""
    g, u = _adapted(gate_up, deltas)
    whole = widen(dy) if lora_dx is None else widen(dy) + widen(lora_dx[0]) @ widen(lora_dx[1])
    gradients = gated_activation.reference_backward(whole, g, u, activation)
    dy.copy_(gated_activation.reference(g, u, activation))
    return torch.cat(gradients, dim=1).to(gate_up.dtype)


def _adapted(gate_up: torch.Tensor, deltas: LoraDeltas) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns g and u [T, F] in fp32 or fp64."""
    gate, up = widen(gate_up).chunk(2, dim=1)
    g, u = (part if delta is None else part + delta.widened() for part, delta in zip((gate, up), deltas, strict=True))
    return g, u


@triton.jit
def _load_adapter(b_ptr, columns, f, stride_c, stride_r, R: tl.constexpr, R_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """B^T (or A) of some columns, [R_PAD, BLOCK_F]."""
    rank = tl.arange(0, R_PAD)
    mask = (rank < R)[:, None] & (columns < f)[None, :]
    return tl.load(b_ptr + columns[None, :] * stride_c + rank.to(tl.int64)[:, None] * stride_r, mask=mask, other=0.0)


@triton.jit
def _delta(rows, xa_ptr, stride, b, R: tl.constexpr, R_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """xa @ b of one tile, [BLOCK_T, BLOCK_F] in fp32."""
    rank = tl.arange(0, R_PAD)
    xa = tl.load(xa_ptr + rows[:, None] * stride + rank[None, :], mask=(rank < R)[None, :], other=0.0)
    return tl.dot(xa, b)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    gu_ptr, y_ptr, t, f, xg_ptr, bg_ptr, stride_g, scale_g, xu_ptr, bu_ptr, stride_u, scale_u,
    RG: tl.constexpr, RG_PAD: tl.constexpr, RU: tl.constexpr, RU_PAD: tl.constexpr, GELU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    first, columns = tl.program_id(0) * BLOCK_T * TILES, tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if RG:
        bg = _load_adapter(bg_ptr, columns, f, RG, 1, RG, RG_PAD)  # [RG_PAD, BLOCK_F]
    if RU:
        bu = _load_adapter(bu_ptr, columns, f, RU, 1, RU, RU_PAD)

    for start in tl.range(first, tl.minimum(first + BLOCK_T * TILES, t), BLOCK_T, num_stages=3):
        rows = start + tl.arange(0, BLOCK_T)
        mask = (rows < t)[:, None] & (columns < f)[None, :]
        rows = tl.minimum(rows, t - 1).to(tl.int64)
        offsets = rows[:, None] * 2 * f + columns[None, :]  # of gate; up lies f further on

        g = tl.load(gu_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(gu_ptr + offsets + f, mask=mask, other=0.0).to(tl.float32)
        if RG:
            g += scale_g * _delta(rows, xg_ptr, stride_g, bg, RG, RG_PAD)
        if RU:
            u += scale_u * _delta(rows, xu_ptr, stride_u, bu, RU, RU_PAD)

        value, _ = _activate(g, GELU)
        tl.store(y_ptr + rows[:, None] * f + columns[None, :], value * u, mask=mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dy_ptr, gu_ptr, dgu_ptr, t, f, xg_ptr, bg_ptr, stride_g, scale_g, xu_ptr, bu_ptr, stride_u, scale_u,
    dxa_ptr, a_ptr, stride_d, RD: tl.constexpr, RD_PAD: tl.constexpr,
    RG: tl.constexpr, RG_PAD: tl.constexpr, RU: tl.constexpr, RU_PAD: tl.constexpr, GELU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    first, columns = tl.program_id(0) * BLOCK_T * TILES, tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if RG:
        bg = _load_adapter(bg_ptr, columns, f, RG, 1, RG, RG_PAD)  # [RG_PAD, BLOCK_F]
    if RU:
        bu = _load_adapter(bu_ptr, columns, f, RU, 1, RU, RU_PAD)
    if RD:
        a = _load_adapter(a_ptr, columns, f, 1, f, RD, RD_PAD)

    for start in tl.range(first, tl.minimum(first + BLOCK_T * TILES, t), BLOCK_T, num_stages=3):
        rows = start + tl.arange(0, BLOCK_T)
        mask = (rows < t)[:, None] & (columns < f)[None, :]
        rows = tl.minimum(rows, t - 1).to(tl.int64)
        offsets = rows[:, None] * 2 * f + columns[None, :]  # of gate; up lies f further on
        offsets_y = rows[:, None] * f + columns[None, :]

        g = tl.load(gu_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(gu_ptr + offsets + f, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets_y, mask=mask, other=0.0).to(tl.float32)
        if RG:
            g += scale_g * _delta(rows, xg_ptr, stride_g, bg, RG, RG_PAD)
        if RU:
            u += scale_u * _delta(rows, xu_ptr, stride_u, bu, RU, RU_PAD)
        if RD:
            dy += _delta(rows, dxa_ptr, stride_d, a, RD, RD_PAD)

        value, derivative = _activate(g, GELU)
        tl.store(dgu_ptr + offsets, dy * u * derivative, mask=mask)
        tl.store(dgu_ptr + offsets + f, dy * value, mask=mask)
        tl.store(dy_ptr + offsets_y, value * u, mask=mask)


def _arguments(delta: LoraDelta | None, unused: torch.Tensor) -> tuple[Any, ...]:
    if delta is None:
        return unused, unused, 0, 0.0
    return delta.xa, delta.b, delta.xa.stride(0), delta.scale


def launch(
    kernel: Any, size: tuple[int, int], arguments: tuple[Any, ...], ranks: dict[str, int], activation: Activation,
    *, small: bool,
) -> None:  # fmt: skip
    """Runs `kernel` over `size`, [T, F]; `ranks` gives the adapters' ranks by the names of the kernel's constants.
    `small`: with few enough registers for cards before Ampere."""
    # the fastest on an H200 of those that 99 KiB of shared memory (Ada) are enough for
    columns, warps = (128, 8) if max(ranks.values()) <= MAX_RANK // 2 else (64, 8 if small else 4)
    padded = {f"{name}_PAD": max(16, triton.next_power_of_2(rank)) for name, rank in ranks.items()}
    kernel[(triton.cdiv(size[0], BLOCK_T * TILES), triton.cdiv(size[1], columns))](
        *arguments, **ranks, **padded, GELU=activation == "gelu_tanh", BLOCK_T=BLOCK_T, BLOCK_F=columns, TILES=TILES,
        num_warps=warps,
    )  # fmt: skip


def _ranks(deltas: LoraDeltas) -> dict[str, int]:
    gate, up = (0 if delta is None else delta.b.shape[1] for delta in deltas)
    return {"RG": gate, "RU": up}


def forward(gate_up: torch.Tensor, activation: Activation, deltas: LoraDeltas) -> torch.Tensor:
    """Returns y [T, F] for `gate_up` [T, 2 F], contiguous."""
    t, f = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(t, f)
    arguments = gate_up, y, t, f, *_arguments(deltas[0], y), *_arguments(deltas[1], y)
    launch(_forward, (t, f), arguments, _ranks(deltas), activation, small=before_ampere(y))
    return y


def backward(
    dy: torch.Tensor, gate_up: torch.Tensor, activation: Activation, deltas: LoraDeltas, lora_dx: LoraDx | None
) -> torch.Tensor:
    """Returns the gradient of `gate_up` [T, 2 F], which is also that of g and u, and overwrites `dy` [T, F] with y.

    `dy` lacks d_xa A of the projection that follows if `lora_dx` gives the two factors.
    """
    t, f = dy.shape
    gradient = torch.empty_like(gate_up)
    d_xa, a = (dy, dy) if lora_dx is None else lora_dx
    arguments = (
        dy, gate_up, gradient, t, f, *_arguments(deltas[0], dy), *_arguments(deltas[1], dy), d_xa, a, d_xa.stride(0),
    )  # fmt: skip
    ranks = _ranks(deltas) | {"RD": 0 if lora_dx is None else a.shape[0]}
    launch(_backward, (t, f), arguments, ranks, activation, small=before_ampere(dy))
    return gradient


class AdaptedActivationFunction(torch.autograd.Function):
    """Autograd around the two kernels; saves gate, up, and both adapters' xa and B."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: Activation, *flat: Any) -> torch.Tensor:
        """See `adapted_activation`; `flat`: xa, B and the scale of the gate's adapter, then of the up projection's."""
        ctx.save_for_backward(gate_up, flat[0], flat[1], flat[3], flat[4])
        ctx.activation, ctx.scales = activation, (flat[2], flat[5])
        return forward(gate_up, activation, (_delta_of(*flat[:3]), _delta_of(*flat[3:])))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of `gate_up`, and of xa and B of both adapters."""
        gate_up, xa_g, b_g, xa_u, b_u = ctx.saved_tensors
        deltas = _delta_of(xa_g, b_g, ctx.scales[0]), _delta_of(xa_u, b_u, ctx.scales[1])
        gradient = backward(dy.clone(memory_format=torch.contiguous_format), gate_up, ctx.activation, deltas, None)

        found: list[torch.Tensor | None] = [gradient, None]
        for part, delta in zip(gradient.chunk(2, dim=1), deltas, strict=True):  # dg, then du, [T, F]
            if delta is None:
                found += [None, None, None]
            else:
                scaled = part * delta.scale
                found += [scaled @ delta.b, scaled.T @ delta.xa, None]
        return tuple(found)


def _delta_of(xa: torch.Tensor | None, b: torch.Tensor | None, scale: float) -> LoraDelta | None:
    return None if xa is None or b is None else LoraDelta(xa, b, scale)


def adapted_activation(gate_up: torch.Tensor, activation: Activation, deltas: LoraDeltas) -> torch.Tensor:
    """f(g) * u, [T, F], for gate and up side by side [T, 2 F] and their LoRA deltas, of ranks up to MAX_RANK.

    Triton on CUDA, the reference elsewhere. Gradients reach `gate_up` and each delta's xa and b.
    """
    if not gate_up.is_cuda:
        return reference(gate_up, activation, deltas)
    flat = [value for delta in deltas for value in ((None, None, 0.0) if delta is None else _fields(delta))]
    return AdaptedActivationFunction.apply(gate_up.contiguous(), activation, *flat)  # type: ignore[no-untyped-call, no-any-return]


def _fields(delta: LoraDelta) -> tuple[torch.Tensor, torch.Tensor, float]:
    return delta.xa, delta.b.contiguous(), delta.scale
