"""Activation of an MLP that has no gate, with the LoRA delta of the projection before it added on the way.

    z   = x + s xa B^T,       y  = f(z)
    dy' = dy + d_xa A,        dz = dy' f'(z)

    f(z) = max(z, 0)^2 (Arcee);  GELU, tanh (Phi-2, StarCoder2);  SiLU;
           xIELU (Apertus): a z^2 + z / 2 for z > 0,  b (e^min(z, -1e-6) - 1 - z) + z / 2 else

Shapes: x [T, F]; xa [T, r], B [F, r], d_xa and A as in `adapted_activation`, of which this is the half without a gate.
Sums are fp32 and rounded once. Backward writes the activations over `dy`.

Source: So et al., "Primer", 2021 (squared ReLU); Huang and Schlag, "Deriving Activation Functions Using Integration",
2024 (xIELU).
"""

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional

from finetune_kernels.ops.adapted_activation import BLOCK_T, MAX_RANK, TILES, LoraDx, _delta, _load_adapter
from finetune_kernels.ops.gated_activation import _activate
from finetune_kernels.primitives.lora_delta import LoraDelta
from finetune_kernels.primitives.precision import widen

Name = Literal["silu", "gelu_tanh", "relu2", "xielu"]
CODES: dict[Name, int] = {"silu": 0, "gelu_tanh": 1, "relu2": 2, "xielu": 3}
"""Name -> the kernels' constant KIND."""
BETA, EPS = tl.constexpr(0.5), tl.constexpr(-1e-6)
"""xIELU's constants."""


class PlainKind(NamedTuple):
    """The function of one layer; xIELU has two numbers that each layer has learnt."""

    name: Name
    positive: float = 0.0
    """xIELU's a."""
    negative: float = 0.0
    """xIELU's b."""


def reference(x: torch.Tensor, kind: PlainKind, delta: LoraDelta | None) -> torch.Tensor:
    """Returns y [T, F] by the formula in fp32 or fp64, rounded to the dtype of `x`."""
    return _apply(_adapted(x, delta), kind).to(x.dtype)


def reference_backward(
    dy: torch.Tensor, x: torch.Tensor, kind: PlainKind, delta: LoraDelta | None, lora_dx: LoraDx | None
) -> torch.Tensor:
    """Returns what `backward` returns, by PyTorch, and overwrites `dy` as well."""
    z = _adapted(x, delta)
    whole = widen(dy) if lora_dx is None else widen(dy) + widen(lora_dx[0]) @ widen(lora_dx[1])
    gradient = (whole * _derivative(z, kind)).to(x.dtype)
    dy.copy_(_apply(z, kind))
    return gradient


def _adapted(x: torch.Tensor, delta: LoraDelta | None) -> torch.Tensor:
    return widen(x) if delta is None else widen(x) + delta.widened()


def _derivative(z: torch.Tensor, kind: PlainKind) -> torch.Tensor:
    """Returns f'(z) by autograd: the formula of the kernels is checked by it."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(_apply(leaf, kind).sum(), leaf)[0]


def _apply(z: torch.Tensor, kind: PlainKind) -> torch.Tensor:
    """Returns f(z)."""
    if kind.name == "relu2":
        return functional.relu(z).square()
    if kind.name == "silu":
        return functional.silu(z)
    if kind.name == "gelu_tanh":
        return functional.gelu(z, approximate="tanh")

    beta, low = BETA.value, z.new_full((), EPS.value)
    positive = kind.positive * z * z + beta * z
    return torch.where(z > 0, positive, (torch.expm1(torch.minimum(z, low)) - z) * kind.negative + beta * z)


@triton.jit
def _values_of(z, positive, negative, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """f(z) and f'(z) in fp32."""
    if KIND < 2:
        value, derivative = _activate(z, KIND == 1)
    elif KIND == 2:
        above = tl.maximum(z, 0.0)
        value = above * above
        derivative = 2.0 * above
    else:
        exponential = tl.exp(tl.minimum(z, EPS))
        below = tl.where(z < EPS, exponential, 0.0)
        value = tl.where(z > 0.0, positive * z * z, (exponential - 1.0 - z) * negative) + BETA * z
        derivative = tl.where(z > 0.0, 2.0 * positive * z, (below - 1.0) * negative) + BETA
    return value, derivative


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, t, f, xa_ptr, b_ptr, stride, scale, positive, negative, R: tl.constexpr, R_PAD: tl.constexpr,
    KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    first, columns = tl.program_id(0) * BLOCK_T * TILES, tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if R:
        b = _load_adapter(b_ptr, columns, f, R, 1, R, R_PAD)  # [R_PAD, BLOCK_F]

    for start in tl.range(first, tl.minimum(first + BLOCK_T * TILES, t), BLOCK_T, num_stages=3):
        rows = start + tl.arange(0, BLOCK_T)
        mask = (rows < t)[:, None] & (columns < f)[None, :]
        rows = tl.minimum(rows, t - 1).to(tl.int64)
        offsets = rows[:, None] * f + columns[None, :]

        z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if R:
            z += scale * _delta(rows, xa_ptr, stride, b, R, R_PAD)
        value, _ = _values_of(z, positive, negative, KIND)
        tl.store(y_ptr + offsets, value, mask=mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dy_ptr, x_ptr, dx_ptr, t, f, xa_ptr, b_ptr, stride, scale, positive, negative, dxa_ptr, a_ptr, stride_d,
    RD: tl.constexpr, RD_PAD: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, KIND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    first, columns = tl.program_id(0) * BLOCK_T * TILES, tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if R:
        b = _load_adapter(b_ptr, columns, f, R, 1, R, R_PAD)  # [R_PAD, BLOCK_F]
    if RD:
        a = _load_adapter(a_ptr, columns, f, 1, f, RD, RD_PAD)

    for start in tl.range(first, tl.minimum(first + BLOCK_T * TILES, t), BLOCK_T, num_stages=3):
        rows = start + tl.arange(0, BLOCK_T)
        mask = (rows < t)[:, None] & (columns < f)[None, :]
        rows = tl.minimum(rows, t - 1).to(tl.int64)
        offsets = rows[:, None] * f + columns[None, :]

        z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if R:
            z += scale * _delta(rows, xa_ptr, stride, b, R, R_PAD)
        if RD:
            dy += _delta(rows, dxa_ptr, stride_d, a, RD, RD_PAD)

        value, derivative = _values_of(z, positive, negative, KIND)
        tl.store(dx_ptr + offsets, dy * derivative, mask=mask)
        tl.store(dy_ptr + offsets, value, mask=mask)


def _launch(kernel: Any, size: tuple[int, int], arguments: tuple[Any, ...], ranks: dict[str, int], name: Name) -> None:
    """Runs `kernel` over `size`, [T, F], in the blocks that `adapted_activation` takes."""
    columns, warps = (128, 8) if max(ranks.values()) <= MAX_RANK // 2 else (64, 4)
    padded = {f"{key}_PAD": max(16, triton.next_power_of_2(rank)) for key, rank in ranks.items()}
    kernel[(triton.cdiv(size[0], BLOCK_T * TILES), triton.cdiv(size[1], columns))](
        *arguments, **ranks, **padded, KIND=CODES[name], BLOCK_T=BLOCK_T, BLOCK_F=columns, TILES=TILES,
        num_warps=warps,
    )  # fmt: skip


def _arguments(delta: LoraDelta | None, kind: PlainKind, unused: torch.Tensor) -> tuple[Any, ...]:
    numbers = (kind.positive, kind.negative)
    if delta is None:
        return unused, unused, 0, 0.0, *numbers
    return delta.xa, delta.b, delta.xa.stride(0), delta.scale, *numbers


def _rank(delta: LoraDelta | None) -> int:
    return 0 if delta is None else delta.b.shape[1]


def forward(x: torch.Tensor, kind: PlainKind, delta: LoraDelta | None) -> torch.Tensor:
    """Returns y [T, F] for x [T, F], contiguous."""
    y = torch.empty_like(x)
    arguments = x, y, *x.shape, *_arguments(delta, kind, y)
    _launch(_forward, (x.shape[0], x.shape[1]), arguments, {"R": _rank(delta)}, kind.name)
    return y


def backward(
    dy: torch.Tensor, x: torch.Tensor, kind: PlainKind, delta: LoraDelta | None, lora_dx: LoraDx | None
) -> torch.Tensor:
    """Returns the gradient of x [T, F], and overwrites `dy` [T, F] with y.

    `dy` lacks d_xa A of the projection that follows if `lora_dx` gives the two factors.
    """
    dx = torch.empty_like(x)
    d_xa, a = (dy, dy) if lora_dx is None else lora_dx
    arguments = dy, x, dx, *x.shape, *_arguments(delta, kind, dy), d_xa, a, d_xa.stride(0)
    ranks = {"R": _rank(delta), "RD": 0 if lora_dx is None else a.shape[0]}
    _launch(_backward, (x.shape[0], x.shape[1]), arguments, ranks, kind.name)
    return dx


class PlainActivationFunction(torch.autograd.Function):
    """Autograd around the two kernels; saves x, and the adapter's xa and B."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, kind: PlainKind, xa: torch.Tensor | None, b: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `plain_activation`."""
        x = x.contiguous()
        ctx.save_for_backward(x, xa, b)
        ctx.kind, ctx.scale = kind, scale
        return forward(x, kind, _delta_of(xa, b, scale))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of x, and of the adapter's xa and B."""
        x, xa, b = ctx.saved_tensors
        delta = _delta_of(xa, b, ctx.scale)
        dx = backward(dy.clone(memory_format=torch.contiguous_format), x, ctx.kind, delta, None)
        if delta is None:
            return dx, None, None, None, None
        scaled = dx * delta.scale
        return dx, None, scaled @ delta.b, scaled.T @ delta.xa, None


def _delta_of(xa: torch.Tensor | None, b: torch.Tensor | None, scale: float) -> LoraDelta | None:
    return None if xa is None or b is None else LoraDelta(xa, b, scale)


def plain_activation(x: torch.Tensor, kind: PlainKind, delta: LoraDelta | None) -> torch.Tensor:
    """f(z), [T, F], for x [T, F] and its LoRA delta, of a rank up to MAX_RANK; Triton on CUDA, the reference elsewhere.

    Gradients reach x and the delta's xa and b.
    """
    if not x.is_cuda:
        return reference(x, kind, delta)
    parts = (None, None, 0.0) if delta is None else (delta.xa, delta.b.contiguous(), delta.scale)
    return PlainActivationFunction.apply(x, kind, *parts)  # type: ignore[no-untyped-call, no-any-return]
