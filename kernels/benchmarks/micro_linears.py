"""Cases of the linear layers for `benchmarks.micro`: products with frozen weights, adapters and their dropout."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from benchmarks.micro_case import Case, Sizes
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.primitives import adapter_dropout
from finetune_kernels.primitives.adapter_dropout import DropoutSeed, Mask
from finetune_kernels.primitives.byte_products.fp8 import Fp8Weight


def linear_cases(sizes: Sizes) -> Iterator[Case]:
    """Yields cases of the products of each group of linears: with the weights, and with the adapters."""
    for name, (features, outputs) in groups_of(sizes).items():
        yield from _group_cases(sizes, name, features, outputs)


def groups_of(sizes: Sizes) -> dict[str, tuple[int, list[int]]]:
    """Returns inputs and outputs of the linears that read the same input, by group."""
    heads = sizes.heads
    wide, narrow = heads.query * heads.size, heads.key_value * heads.size
    return {
        "qkv": (sizes.hidden, [wide, narrow, narrow]), "o": (wide, [sizes.hidden]),
        "gate_up": (sizes.hidden, [sizes.feed_forward] * 2), "down": (sizes.feed_forward, [sizes.hidden]),
    }  # fmt: skip


def dropout_cases(sizes: Sizes) -> Iterator[Case]:
    """Yields cases of an adapter's dropped input, and of its part of that input's gradient."""
    t, n, r = sizes.tokens, sizes.hidden, sizes.rank
    x, d_xa, a = sizes.random(t, n), sizes.random(t, r), sizes.random(r, n, scale=0.02)
    mask = Mask(DropoutSeed(1), 0, 0.1)
    stays = torch.rand(t, n, device=sizes.device) > 0.1
    rows, small = t * n * sizes.element, (t + n) * r * sizes.element  # bytes of [T, in], and of both factors

    yield Case(
        "adapter_dropout drop", "forward", f"{t} x {n}", 2 * rows, "TB/s", lambda: adapter_dropout.drop(x, mask),
        lambda: functional.dropout(x, 0.1),
    )  # fmt: skip
    yield Case(
        "adapter_dropout add_share", "backward", f"{t} x {n}", 2 * rows + small, "TB/s",
        lambda: adapter_dropout.add_lora_dx(x, d_xa, a, mask), lambda: x.add_(d_xa @ a * stays / 0.9),
    )  # fmt: skip


def _group_cases(sizes: Sizes, name: str, features: int, outputs: list[int]) -> Iterator[Case]:
    group = LinearGroup([_linear(sizes, features, output) for output in outputs], sizes.dtype, keep_dequantized=True)
    t, out, ranks = sizes.tokens, sum(outputs), sizes.rank * len(outputs)

    x, dy, weight = sizes.random(t, features), sizes.random(t, out), group.frozen.tensor()
    pass_ctx = group.begin(None)
    xa, d_xa = group.xa(x, pass_ctx), group.d_xa(dy, pass_ctx)
    shape, e = f"{t} x {features} -> {out}", sizes.element

    # products with the frozen weights
    yield Case(
        f"linear_group {name}", "forward", shape, 2.0 * t * features * out, "TFLOP/s", lambda: group.base(x, pass_ctx),
    )  # fmt: skip
    yield Case(
        f"linear_group {name}", "backward", shape, 2.0 * t * features * out, "TFLOP/s", lambda: dy @ weight,
    )  # fmt: skip
    if sizes.device == "cuda":
        fp8_weight = Fp8Weight(weight)
        yield Case(
            f"linear_group {name}, 8 bits", "forward", shape, 2.0 * t * features * out, "TFLOP/s",
            lambda: fp8_weight.forward(x, None), lambda: group.base(x, pass_ctx),
        )  # fmt: skip

    # products with the adapters: bytes, as their ranks are small
    yield Case(
        f"linear_group {name}, x A^T", "forward", shape, e * (t * (features + ranks) + ranks * features), "TB/s",
        lambda: group.xa(x, pass_ctx),
    )  # fmt: skip
    yield Case(
        f"linear_group {name}, dy B", "backward", shape, e * (t * (out + ranks) + sizes.rank * out), "TB/s",
        lambda: group.d_xa(dy, pass_ctx),
    )  # fmt: skip
    yield Case(
        f"linear_group {name}, dA and dB", "backward", shape,
        e * (t * (features + out + 2 * ranks) + ranks * features + sizes.rank * out), "TB/s",
        lambda: group.gradients(dy, x, xa, d_xa, pass_ctx),
    )  # fmt: skip


def _linear(sizes: Sizes, features: int, output: int) -> Any:
    """Returns what `LinearGroup` reads of a peft layer: a linear layer with an adapter."""
    base = torch.nn.Linear(features, output, bias=False, dtype=sizes.dtype, device=sizes.device).requires_grad_(False)
    a, b = sizes.random(sizes.rank, features), sizes.random(output, sizes.rank, scale=0.02)
    return SimpleNamespace(
        base_layer=base, active_adapters=["default"], scaling={"default": 1.0},
        lora_A={"default": SimpleNamespace(weight=a)}, lora_B={"default": SimpleNamespace(weight=b)},
        lora_dropout={"default": torch.nn.Identity()}, lora_magnitude_vector={},
    )  # fmt: skip
