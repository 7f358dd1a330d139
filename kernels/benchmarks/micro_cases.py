"""Cases of norms, rotation, activations and the head: one call at the shapes of a layer, and what it costs.

Bytes are what must be read and written once, from the kernel's formula; operations are two for each multiply-add.
Beside ours stands the same computation in eager PyTorch, and Liger's kernel where it is installed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from benchmarks.micro_case import Case, Sizes, backward_of, liger
from finetune_kernels.ops import adapted_activation, gated_activation, rms_norm, rotary_embedding
from finetune_kernels.ops.blocked_cross_entropy import blocked_cross_entropy
from finetune_kernels.ops.linear_cross_entropy import LinearCrossEntropyFunction
from finetune_kernels.ops.linear_cross_entropy import reference as plain_cross_entropy
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.primitives.attention.inputs import Qkv
from finetune_kernels.primitives.head_norm import HeadNorm
from finetune_kernels.primitives.lora_delta import LoraDelta


def norm_cases(sizes: Sizes) -> Iterator[Case]:
    """Yields cases of RMSNorm, with and without the residual stream."""
    t, n = sizes.tokens, sizes.hidden
    x, delta, dy, dh = (sizes.random(t, n) for _ in range(4))
    weight, shape, rows = sizes.random(n), f"{t} x {n}", t * n * sizes.element  # rows: bytes of [T, hidden]
    norm = Norm(weight, 1e-5)
    _, _, rstd = rms_norm.forward(x, norm)
    one, added = liger("rms_norm"), liger("fused_add_rms_norm")

    def theirs(value: torch.Tensor) -> Any:
        return one(value, weight, 1e-5, in_place=False)

    def eager(value: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(value, (n,), weight, 1e-5)

    yield Case(
        "rms_norm", "forward", shape, 2 * rows, "TB/s", lambda: rms_norm.forward(x, norm), lambda: eager(x),
        one and (lambda: one(x, weight, 1e-5)), "liger",
    )  # fmt: skip
    yield Case(
        "rms_norm, residual", "forward", shape, 4 * rows, "TB/s",
        lambda: rms_norm.forward(x, norm, delta=delta), lambda: eager(x + delta),
        added and (lambda: added(x, delta, weight, 1e-5)), "liger",
    )  # fmt: skip
    yield Case(
        "rms_norm", "backward", shape, 3 * rows, "TB/s", lambda: rms_norm.backward(dy, x, norm, rstd),
        backward_of(eager, [x], dy), one and backward_of(theirs, [x], dy), "liger",
    )  # fmt: skip
    yield Case(
        "rms_norm, residual", "backward", f"{shape}, norm again", 5 * rows, "TB/s",
        lambda: rms_norm.backward(dy, x, norm, rstd, residual=dh, return_y=True),
    )  # fmt: skip


def rotation_cases(sizes: Sizes) -> Iterator[Case]:
    """Yields cases of rotary embedding of q and k, with and without a norm of each head."""
    t, heads = sizes.tokens, sizes.heads
    qkv = sizes.random(t, heads.width)
    angles = torch.rand(t, heads.size // 2, device=sizes.device).repeat(1, 2)
    cos, sin = angles.cos().to(sizes.dtype), angles.sin().to(sizes.dtype)
    gradients = Qkv(*(part.contiguous() for part in heads.split(sizes.random(t, heads.width))))
    norm = HeadNorm(sizes.random(heads.size), sizes.random(heads.size), 1e-6)

    # bytes of a row of q, k and v, of its rotated part, and of cos and sin together
    row, turned = heads.width * sizes.element, heads.rotated * heads.size * sizes.element
    angle, shape = heads.size * sizes.element, f"{t} x ({heads.query} + 2 x {heads.key_value}) x {heads.size}"

    rope = liger("rope")
    q, k, _ = (part.transpose(0, 1).unsqueeze(0) for part in heads.split(qkv.clone()))
    whole = (cos.unsqueeze(0), sin.unsqueeze(0))

    def forward(head_norm: HeadNorm | None) -> torch.Tensor:
        return rotary_embedding.forward(qkv, cos, sin, heads, head_norm)

    def eager(head_norm: HeadNorm | None) -> torch.Tensor:
        return rotary_embedding.reference(qkv, cos, sin, heads, head_norm)

    def backward(head_norm: HeadNorm | None) -> torch.Tensor:
        return rotary_embedding.backward(gradients, qkv, cos, sin, heads, head_norm)

    yield Case(
        "rotary_embedding", "forward", shape, t * (2 * turned + angle), "TB/s", lambda: forward(None),
        lambda: eager(None), rope and (lambda: rope(q, k, *whole)), "liger",
    )  # fmt: skip
    yield Case("rotary_embedding", "backward", shape, t * (2 * row + angle), "TB/s", lambda: backward(None))
    yield Case(
        "rotary_embedding, head norm", "forward", shape, t * (2 * row + angle), "TB/s", lambda: forward(norm),
        lambda: eager(norm),
    )  # fmt: skip
    yield Case(
        "rotary_embedding, head norm", "backward", shape, t * (2 * row + turned + angle), "TB/s",
        lambda: backward(norm),
    )  # fmt: skip


def activation_cases(sizes: Sizes) -> Iterator[Case]:
    """Yields cases of SwiGLU, alone and with the adapters' LoRA deltas inside."""
    t, f, r = sizes.tokens, sizes.feed_forward, sizes.rank
    gate, up, dy, gate_up = sizes.random(t, f), sizes.random(t, f), sizes.random(t, f), sizes.random(t, 2 * f)
    xa, b = sizes.random(t, 2 * r), sizes.random(2 * f, r, scale=0.02)
    deltas = LoraDelta(xa[:, :r], b[:f], 1.0), LoraDelta(xa[:, r:], b[f:], 1.0)
    lora_dx = sizes.random(t, r), sizes.random(r, f, scale=0.02)
    plane, small, shape = t * f * sizes.element, 2 * (t + f) * r * sizes.element, f"{t} x {f}"
    swiglu = liger("swiglu")

    def ours(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return gated_activation.GatedActivationFunction.apply(g, u, "silu")  # type: ignore[no-untyped-call, no-any-return]

    def eager(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return functional.silu(g) * u

    yield Case(
        "gated_activation", "forward", shape, 3 * plane, "TB/s", lambda: ours(gate, up), lambda: eager(gate, up),
        swiglu and (lambda: swiglu(gate, up)), "liger",
    )  # fmt: skip
    yield Case(
        "gated_activation", "backward", shape, 5 * plane, "TB/s", backward_of(ours, [gate, up], dy),
        backward_of(eager, [gate, up], dy), swiglu and backward_of(swiglu, [gate.clone(), up.clone()], dy), "liger",
    )  # fmt: skip
    yield Case(
        "adapted_activation", "forward", shape, 3 * plane + small, "TB/s",
        lambda: adapted_activation.forward(gate_up, "silu", deltas),
        lambda: adapted_activation.reference(gate_up, "silu", deltas),
    )  # fmt: skip
    yield Case(
        "adapted_activation", "backward", shape, 6 * plane + 1.5 * small, "TB/s",
        lambda: adapted_activation.backward(dy, gate_up, "silu", deltas, lora_dx),
    )  # fmt: skip


def head_cases(sizes: Sizes) -> Iterator[Case]:
    """Yields cases of the head and its loss: forward, and the gradient of its input."""
    t, n, v = sizes.tokens, sizes.hidden, sizes.vocabulary
    hidden, weight = sizes.random(t, n).requires_grad_(), sizes.random(v, n, scale=0.02)
    targets = torch.randint(0, v, (t,), device=sizes.device)
    fused = liger("fused_linear_cross_entropy")

    def both(loss: torch.Tensor) -> Any:
        return torch.autograd.grad(loss, hidden)

    yield Case(
        "linear_cross_entropy", "both", f"{t} x {n} -> {v}", 4.0 * t * n * v, "TFLOP/s",
        lambda: both(LinearCrossEntropyFunction.apply(hidden, weight, targets, None)),  # type: ignore[no-untyped-call]
        lambda: both(plain_cross_entropy(hidden, weight, targets)),
        fused and (lambda: both(fused(hidden, weight, targets, reduction="sum"))), "liger",
    )  # fmt: skip
    odd = v - v % 8 + 1  # rows of logits that would begin anywhere, were they not aligned
    wide, any_target = sizes.random(odd, n, scale=0.02), targets % odd
    yield Case(
        "linear_cross_entropy, odd", "both", f"{t} x {n} -> {odd}", 4.0 * t * n * odd, "TFLOP/s",
        lambda: both(LinearCrossEntropyFunction.apply(hidden, wide, any_target, None)),  # type: ignore[no-untyped-call]
        lambda: both(plain_cross_entropy(hidden, wide, any_target)),
    )  # fmt: skip
    host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda).copy_(weight)
    yield Case(
        "blocked_cross_entropy", "both", f"{t} x {n} -> {v}, head in host memory", 4.0 * t * n * v, "TFLOP/s",
        lambda: both(blocked_cross_entropy(hidden, host, targets)),
    )  # fmt: skip
