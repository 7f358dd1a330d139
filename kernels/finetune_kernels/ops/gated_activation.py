"""Gated activations of the MLP, SwiGLU and GeGLU, in one pass each way.

    y  = f(g) * u,             f = SiLU: g sigmoid(g),   or GELU (tanh): g / 2 (1 + tanh(0.79788456 (g + 0.044715 g^3)))
    dg = dy * u * f'(g),       du = dy * f(g)

Shapes: gate g, up u, y and their gradients have one shape, [..., F], in any float type; the arithmetic is fp32. The
backward kernel reads dy, g and u once and writes both gradients; eager PyTorch makes about eight passes over the same.

Source: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016
(its tanh form).
"""

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch.nn import functional

from finetune_kernels.primitives.precision import widen

BLOCK = 1024
"""Elements of one program."""
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)
Activation = Literal["silu", "gelu_tanh"]


def reference(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Returns f(gate) * up by the formula in fp32 or fp64, rounded to the dtype of `gate`."""
    wide = widen(gate)
    activated = functional.silu(wide) if activation == "silu" else functional.gelu(wide, approximate="tanh")
    return (activated * widen(up)).to(gate.dtype)


def reference_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of `gate` and `up` by the formula."""
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
    """f(g) and f'(g) in fp32."""
    if GELU:
        inner = SQRT_2_OVER_PI * (g + CUBIC * g * g * g)
        t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0  # tanh(inner)
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
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offsets < n

    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activate(g, GELU)
    tl.store(y_ptr + offsets, value * u, mask=mask)


@triton.jit
def _backward(dy_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, n, GELU: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offsets < n

    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

    value, derivative = _activate(g, GELU)
    tl.store(dg_ptr + offsets, dy * u * derivative, mask=mask)
    tl.store(du_ptr + offsets, dy * value, mask=mask)


def forward(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Returns y; `gate` and `up` are contiguous."""
    y, n = torch.empty_like(gate), gate.numel()
    _forward[(triton.cdiv(n, BLOCK),)](gate, up, y, n, GELU=activation == "gelu_tanh", BLOCK_N=BLOCK)
    return y


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of `gate` and `up`; all inputs are contiguous."""
    dg, du, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    gelu = activation == "gelu_tanh"
    _backward[(triton.cdiv(n, BLOCK),)](dy, gate, up, dg, du, n, GELU=gelu, BLOCK_N=BLOCK)
    return dg, du


class GatedActivationFunction(torch.autograd.Function):
    """Autograd around the two kernels; saves gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """See `gated_activation`."""
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return forward(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Returns the gradients of `gate` and `up`."""
        gate, up = ctx.saved_tensors
        return *backward(dy.contiguous(), gate, up, ctx.activation), None


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """f(gate) * up, [..., F]: Triton on CUDA, the reference elsewhere."""
    if not gate.is_cuda:
        return reference(gate, up, activation)
    return GatedActivationFunction.apply(gate, up, activation)  # type: ignore[no-untyped-call, no-any-return]
