"""Comparisons of the norms', activations' and RoPE's kernels with their formulas, for planted mistakes."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from finetune_kernels.primitives.head_norm import HeadNorm
from finetune_kernels.primitives.lora_delta import LoraDelta
from finetune_test_kernels.mutated_kernels import Load, true_modules
from finetune_test_kernels.tensor_checks import doubled, normal

Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Found and expected."""


def rms_norm(load: Load) -> Pairs:
    ours, true = load("rms_norm"), true_modules("rms_norm")
    x, delta, dy, dh, w = normal(3, 10), normal(3, 10, seed=1), normal(3, 10, seed=2), normal(3, 10, seed=3), normal(10)
    found, exact = [], []
    for offset, added, residual, centered in ((1.0, delta, dh, False), (0.0, None, None, False), (0.0, None, dh, True)):
        norm = true.Norm(w, 0.1, offset, centered, normal(10, seed=4) if centered else None)
        exact_norm = doubled(norm)
        h, y, rstd = true.reference_forward(x.double(), exact_norm, added)
        exact += [h, y, rstd]
        exact += true.reference_backward(dy.double(), h, exact_norm, rstd, residual, return_y=True)
        found += ours.forward(x, norm, added)
        found += ours.backward(dy, h.float(), norm, rstd.float(), residual, return_y=True)
    yield from zip(found, exact, strict=True)


def gated_activation(load: Load) -> Pairs:
    ours, true = load("gated_activation"), true_modules("gated_activation")
    vars(ours).update(BLOCK=8)  # several blocks, the last one not full
    gate, up, dy = 2 * normal(3, 5), normal(3, 5, seed=1), normal(3, 5, seed=2)
    for activation in ("silu", "gelu_tanh"):
        leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        y = ours.GatedActivationFunction.apply(*leaves, activation)
        yield y, true.reference(gate.double(), up.double(), activation)
        exact = true.reference_backward(dy.double(), gate.double(), up.double(), activation)
        yield from zip(torch.autograd.grad(y, leaves, dy), exact, strict=True)


def adapted_activation(load: Load) -> Pairs:
    ours, true = load("adapted_activation"), true_modules("adapted_activation")
    vars(ours).update(BLOCK_T=16, TILES=2)
    t, f = 35, 20
    gate_up, dy = normal(t, 2 * f), normal(t, f, seed=1)
    inner, d, a = normal(t, 24, seed=2), normal(t, 19, seed=3)[:, :18], normal(18, f, seed=4)
    parts = [(inner[:, :18], normal(f, 18, seed=5), 0.5), (inner[:, 18:23], normal(f, 5, seed=6), 1.5)]
    deltas = tuple(LoraDelta(*part) for part in parts)
    exact_deltas = tuple(LoraDelta(i.double(), b.double(), s) for i, b, s in parts)
    activations, exact_dy = dy.clone(), dy.double()
    found = ours.backward(activations, gate_up, "silu", deltas, (d, a))
    exact = true.reference_backward(exact_dy, gate_up.double(), "silu", exact_deltas, (d.double(), a.double()))
    y = ours.forward(gate_up, "silu", deltas)
    yield from [(found, exact), (activations, exact_dy), (y, exact_dy)]


def plain_activation(load: Load) -> Pairs:
    ours, true = load("plain_activation"), true_modules("plain_activation")
    t, f = 35, 20
    x, dy, inner = normal(t, f), normal(t, f, seed=1), normal(t, 18, seed=2) / 4
    b, d, a = normal(f, 18, seed=3), normal(t, 17, seed=4), normal(17, f, seed=5)
    delta, exact_delta = LoraDelta(inner, b, 0.5), LoraDelta(inner.double(), b.double(), 0.5)
    for name in ("silu", "gelu_tanh", "relu2", "xielu"):
        kind, activations, exact_dy = true.PlainKind(name, 0.7, 1.1), dy.clone(), dy.double()
        found = ours.backward(activations, x, kind, delta, (d, a))
        exact = true.reference_backward(exact_dy, x.double(), kind, exact_delta, (d.double(), a.double()))
        yield from [(found, exact), (activations, exact_dy), (ours.forward(x, kind, delta), exact_dy)]


def rotary_embedding(load: Load) -> Pairs:
    ours, true = load("rotary_embedding"), true_modules("rotary_embedding")
    heads, angles = true.Heads(2, 1, 16), normal(2, 8)
    cos, sin = (torch.cat((part, part), dim=1) for part in (angles.cos(), angles.sin()))
    qkv, dy, weights = normal(2, heads.width, seed=1), normal(2, heads.width, seed=2), normal(2, 16, seed=3)
    both = HeadNorm(weights[0], weights[1], 0.1)
    last = replace(both, place="rotated head")
    row = HeadNorm(normal(32, seed=4), normal(16, seed=5), 0.1, "row")
    value = replace(both, value=True)
    for norm, pairs in ((None, False), (both, False), (value, False), (last, False), (row, False), (None, True)):
        heads, exact = replace(heads, pairs=pairs), [value.double() for value in (qkv, cos, sin)]
        yield ours.forward(qkv.clone(), cos, sin, heads, norm), true.reference(*exact, heads, norm)
        back = true.reference_backward(heads.split(dy.double()), *exact, heads, norm)
        yield ours.backward(heads.split(dy), qkv, cos, sin, heads, norm), back
