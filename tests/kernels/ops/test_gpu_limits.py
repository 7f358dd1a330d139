"""Limits of a GPU: tensors of more than 2^31 elements, streams other than the default one, what autograd saved."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from finetune_kernels.ops import adapted_activation, attention, rms_norm
from finetune_kernels.ops import rotary_embedding as rotary
from finetune_kernels.ops.gated_activation import gated_activation
from finetune_kernels.ops.linear_cross_entropy import linear_cross_entropy
from finetune_kernels.ops.lora_linear import lora_linear
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.primitives import adapter_dropout
from finetune_kernels.primitives.adapter_dropout import DropoutSeed, Mask
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.head_norm import HeadNorm
from finetune_kernels.primitives.lora_delta import LoraDelta
from finetune_kernels.primitives.nf4 import dequantize
from finetune_test_kernels.tensor_checks import normal, relative_error, watched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # a GPU's image has other versions than the lock, which warn of other things
]
LIMIT = 2**31
TAIL = 40
"""Rows at the end, all beyond the limit, that are computed once more alone."""
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def memory() -> Any:
    """Nothing of the test before is left."""
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def needs(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free / 2**30:.0f} are")


def rows_beyond(width: int) -> int:
    return LIMIT // width + 2 * TAIL


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator(device="cuda").manual_seed(seed)
    return torch.empty(shape, dtype=BF16, device="cuda").normal_(generator=draw)


def test_norm_beyond_the_limit() -> None:
    needs(30)
    t = rows_beyond(4096)
    x, dy, weight = random(t, 4096), random(t, 4096, seed=1), random(4096, seed=2)
    norm = Norm(weight, 1e-5)
    h, y, rstd = rms_norm.forward(x, norm, delta=dy)
    dx, again = rms_norm.backward(dy, h, norm, rstd, residual=x, return_y=True)

    end = slice(t - TAIL, None)
    small_h, small_y, small_rstd = rms_norm.forward(x[end], norm, delta=dy[end])
    small_dx, _ = rms_norm.backward(dy[end], small_h, norm, small_rstd, residual=x[end], return_y=True)
    pairs = {"h": (h, small_h), "y": (y, small_y), "again": (again, small_y), "dx": (dx, small_dx)}
    assert {name: torch.equal(big[end], small) for name, (big, small) in pairs.items()} == dict.fromkeys(pairs, True)


def test_gated_activation_beyond_the_limit() -> None:
    needs(30)
    gate, up = random(LIMIT + 5000).requires_grad_(), random(LIMIT + 5000, seed=1).requires_grad_()
    y = gated_activation(gate, up, "silu")
    found = [y, *torch.autograd.grad(y, [gate, up], up.detach())]
    ends = [value.detach()[LIMIT - 100 :].clone().requires_grad_() for value in (gate, up)]
    small = gated_activation(ends[0], ends[1], "silu")
    for big, alone in zip(found, [small, *torch.autograd.grad(small, ends, ends[1].detach())], strict=True):
        assert torch.equal(big[LIMIT - 100 :], alone)


def test_adapted_activation_beyond_the_limit() -> None:
    needs(45)
    f = 14336
    t = rows_beyond(f)  # gate and up side by side have twice as many
    gate_up, dy, inner, b = random(t, 2 * f), random(t, f, seed=1), random(t, 32, seed=2), random(f, 16, seed=3)
    d, a = random(t, 16, seed=4), random(16, f, seed=5)

    def both(rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = inner[rows]
        deltas = (LoraDelta(parts[:, :16], b, 0.1), LoraDelta(parts[:, 16:], b, 0.1))
        y = adapted_activation.forward(gate_up[rows], "silu", deltas)
        activations = dy[rows].clone()
        return y, adapted_activation.backward(activations, gate_up[rows], "silu", deltas, (d[rows], a)), activations

    end = slice(t - TAIL, None)
    for big, alone in zip(both(slice(None)), both(end), strict=True):
        assert torch.equal(big[end], alone)


def test_dropout_beyond_the_limit() -> None:
    needs(20)
    t = rows_beyond(14336)
    x, d, a, mask = random(t, 14336), random(t, 16, seed=1), random(16, 14336, seed=2), Mask(DropoutSeed(3), 1, 0.1)
    end, rest = slice(t - TAIL, None), mask.from_row(t - TAIL)
    small = adapter_dropout.add_lora_dx(x[end].clone(), d[end], a, rest)
    assert torch.equal(adapter_dropout.drop(x, mask)[end], adapter_dropout.drop(x[end], rest))
    assert torch.equal(adapter_dropout.add_lora_dx(x, d, a, mask)[end], small)


@pytest.mark.parametrize("with_norm", [False, True])
def test_rotation_beyond_the_limit(with_norm: bool) -> None:
    needs(30)
    heads = rotary.Heads(32, 8, 128)
    t = rows_beyond(heads.width)
    qkv, angles = random(t, heads.width), random(t, 128, seed=1)
    norm = HeadNorm(random(128, seed=2), random(128, seed=3), 1e-6) if with_norm else None

    end = slice(t - TAIL, None)
    alone = qkv[end].clone()
    small_back = rotary.backward(heads.split(alone), alone, angles[end], angles[end], heads, norm)
    big_back = rotary.backward(heads.split(qkv), qkv, angles, angles, heads, norm)
    assert torch.equal(big_back[end], small_back)

    del big_back
    small = rotary.forward(alone, angles[end], angles[end], heads, norm)
    assert torch.equal(rotary.forward(qkv, angles, angles, heads, norm)[end], small)


def test_head_beyond_the_limit() -> None:
    needs(20)
    s = rows_beyond(4096)
    hidden, weight = random(s, 4096).requires_grad_(), random(384, 4096, seed=1) / 64
    targets = torch.arange(s, device="cuda") % 384
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)
    end = slice(s - s % 1024, None)  # whole chunks, so that the same products are made
    last = hidden.detach()[end].clone().requires_grad_()
    (alone,) = torch.autograd.grad(linear_cross_entropy(last, weight, targets[end]), last)
    assert torch.equal(gradient[end], alone)


@pytest.mark.parametrize("nested", [True, False])
def test_nf4_beyond_the_limit(nested: bool) -> None:
    needs(20)
    times = LIMIT // 4096**2 + 1
    weights = random(4096, 4096) / 50
    packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=nested)
    large = copy.deepcopy(state)
    large.shape, large.absmax = torch.Size((times * 4096, 4096)), state.absmax.repeat(times)
    if nested:
        large.state2.absmax = state.state2.absmax.repeat(times)
    out = torch.full(large.shape, float("nan"), dtype=BF16, device="cuda")
    dequantize(packed.repeat(times, 1), large, out)
    expected = dequantize_4bit(packed, state)
    assert all(torch.equal(part, expected) for part in out.split(4096))


def test_attention_beyond_the_limit() -> None:
    """FlashAttention's backward by cumulative lengths counts (tokens + 128 documents) heads size in 32 bits."""
    needs(60)
    lengths = [4096, 2048] * 87
    t = sum(lengths)
    assert (t + 128 * len(lengths)) * 32 * 128 > LIMIT
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    inputs = [random(t, count, 128, seed=count) for count in (32, 8, 8)]
    dout = random(t, 32, 128, seed=9)

    def both(rows: slice, sequences: PackedSequences) -> list[torch.Tensor]:
        qkv, params = Qkv(*inputs).select(rows), AttentionParams(128**-0.5)
        out, saved = attention.forward(qkv, sequences, params)
        return [out, *attention.backward(dout[rows], qkv, out, saved, sequences, params)]

    end = slice(t - 6144, None)
    found = [value[end] for value in both(slice(None), PackedSequences(ends, 4096, t))]
    last = torch.tensor([0, 4096, 6144], device="cuda", dtype=torch.int32)
    for name, ours, alone in zip(
        ("out", "dq", "dk", "dv"), found, both(end, PackedSequences(last, 4096, 6144)), strict=True
    ):
        assert relative_error(ours, alone) < 1e-2, name  # dq is summed in an order that changes from run to run


CALLS: dict[str, tuple[Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {
    "norm": (lambda x: rms_norm.rms_norm(x, Norm(WEIGHTS[0, : x.shape[1]], 1e-5)), [(512, 1024)]),
    "SwiGLU": (lambda gate, up: gated_activation(gate, up, "silu"), [(512, 1024)] * 2),
    "head": (lambda hidden: linear_cross_entropy(hidden, WEIGHTS, torch.arange(512, device="cuda")), [(512, 1024)]),
    "LoRA linear": (lambda x, a, b: lora_linear(x, lambda: WEIGHTS, a, b, 0.5), [(512, 1024), (16, 1024), (1024, 16)]),
}
WEIGHTS = normal(1024, 1024, dtype=BF16) / 32


@pytest.mark.parametrize("name", CALLS)
def test_work_stays_on_the_callers_stream(name: str) -> None:
    """The inputs arrive late, on the caller's stream: work on any other would see what was there before."""
    call, shapes = CALLS[name]
    values = [normal(*shape, dtype=BF16, seed=seed) / 4 for seed, shape in enumerate(shapes)]
    inputs = [value.clone().requires_grad_() for value in values]
    result = call(*inputs)
    expected = [result, *torch.autograd.grad(result, inputs, torch.ones_like(result))]

    late = [torch.full_like(value, float("nan")).requires_grad_() for value in values]
    torch.cuda.synchronize()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms
        with torch.no_grad():
            for place, value in zip(late, values, strict=True):
                place.copy_(value)
        result = call(*late)
        found = [result, *torch.autograd.grad(result, late, torch.ones_like(result))]

    stream.synchronize()
    for ours, truth in zip(found, expected, strict=True):
        assert relative_error(ours, truth) < 1e-2  # what was there before is no number


@pytest.mark.parametrize("name", CALLS)
def test_what_was_saved_stays_as_it_was(name: str) -> None:
    call, shapes = CALLS[name]
    inputs = [normal(*shape, dtype=BF16, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    with watched() as guard:
        result = call(*inputs)
    upstream = normal(*result.shape, seed=5).to(result.dtype)
    kept = upstream.clone()
    torch.autograd.grad(result, inputs, upstream)
    torch.cuda.synchronize()
    assert guard.entries
    assert not guard.changed()
    assert torch.equal(upstream, kept)


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values with a stride of two; in between lies what must not be read."""
    return torch.stack((x, torch.full_like(x, float("nan"))), dim=-1)[..., 0]


@pytest.mark.parametrize("name", CALLS)
def test_strides_change_nothing(name: str) -> None:
    call, shapes = CALLS[name]
    found = []
    for lay_out in (torch.clone, spread):
        inputs = [
            lay_out(normal(*shape, dtype=BF16, seed=seed) / 4).requires_grad_() for seed, shape in enumerate(shapes)
        ]
        result = call(*inputs)
        upstream = lay_out(normal(*result.shape, seed=5).to(result.dtype))
        found.append([result, *torch.autograd.grad(result, inputs, upstream)])
    for expected, ours in zip(*found, strict=True):
        assert relative_error(ours, expected) < 1e-2  # products may sum in another order


@pytest.mark.parametrize("name", ["norm", "SwiGLU", "LoRA linear"])
def test_no_rows_give_no_gradient(name: str) -> None:
    call, shapes = CALLS[name]
    inputs = [normal(*((0, shape[1]) if shape[0] == 512 else shape), dtype=BF16).requires_grad_() for shape in shapes]
    result = call(*inputs)
    assert result.shape[0] == 0
    for value, gradient in zip(inputs, torch.autograd.grad(result, inputs, torch.ones_like(result)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(value))
