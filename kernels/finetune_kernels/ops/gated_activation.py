"""Gated activations of the MLP, SwiGLU and GeGLU, in one pass each way.

    y = f(g) * u,   f = SiLU: g * sigmoid(g),   or GELU (tanh): g/2 * (1 + tanh(c)),   c = 0.79788456 * (g + 0.044715
    g^3) dg = dy * u * f'(g),   du = dy * f(g)

The backward kernel reads dy, g and u once and writes both gradients; eager PyTorch makes about eight passes over the
same.
"""

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch.nn import functional

from finetune_kernels.primitives.precision import widen

BLOCK = 1024
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)
Activation = Literal["silu", "gelu_tanh"]


def reference(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The formula in fp32 or fp64; `gate` and `up` have one shape."""
    wide = widen(gate)
    activated = functional.silu(wide) if activation == "silu" else functional.gelu(wide, approximate="tanh")
    return (activated * widen(up)).to(gate.dtype)


def reference_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `gate` and `up` by the formula."""
    d, g, u = widen(dy), widen(gate), widen(up)
    if activation == "silu":
        s = torch.sigmoid(g)
        value, derivative = g * s, s * (1 + g * (1 - s))
    else:
        root, cubic = SQRT_2_OVER_PI.value, CUBIC.value
        t = torch.tanh(root * (g + cubic * g**3))
        value = g / 2 * (1 + t)
        derivative = (1 + t) / 2 + g / 2 * (1 - t * t) * root * (1 + 3 * cubic * g * g)
    return (d * u * derivative).to(gate.dtype), (d * value).to(gate.dtype)


@triton.jit
def _activate(g, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """f(g) and f'(g)."""
    if GELU:
        inner = SQRT_2_OVER_PI * (g + CUBIC * g * g * g)
        t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0  # tanh
        slope = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * g * g)
        value = 0.5 * g * (1.0 + t)
        derivative = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * slope
    else:
        s = tl.sigmoid(g)
        value = g * s
        derivative = s * (1.0 + g * (1.0 - s))
    return value, derivative


@triton.jit
def _forward(g_ptr, u_ptr, y_ptr, n, GELU: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at < n
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(g, GELU)
    tl.store(y_ptr + at, value * u, mask=inside)


@triton.jit
def _backward(dy_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, n, GELU: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at < n
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, derivative = _activate(g, GELU)
    tl.store(dg_ptr + at, dy * u * derivative, mask=inside)
    tl.store(du_ptr + at, dy * value, mask=inside)


class GatedActivationFunction(torch.autograd.Function):
    """Autograd around the two kernels."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """See `reference`."""
        gate, up = gate.contiguous(), up.contiguous()
        y, n = torch.empty_like(gate), gate.numel()
        _forward[(triton.cdiv(n, BLOCK),)](gate, up, y, n, GELU=activation == "gelu_tanh", BLOCK_N=BLOCK)
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Gradients of `gate` and `up`."""
        gate, up = ctx.saved_tensors
        dg, du, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        gelu = ctx.activation == "gelu_tanh"
        _backward[(triton.cdiv(n, BLOCK),)](dy.contiguous(), gate, up, dg, du, n, GELU=gelu, BLOCK_N=BLOCK)
        return dg, du, None


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """f(gate) * up: Triton on CUDA, the reference elsewhere."""
    if not gate.is_cuda:
        return reference(gate, up, activation)
    return GatedActivationFunction.apply(gate, up, activation)  # type: ignore[no-untyped-call, no-any-return]
