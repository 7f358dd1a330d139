"""Every kernel's error against fp64 on a GPU in bfloat16, as a ratio to the error of eager PyTorch in bfloat16.

"Eager" is what transformers computes: one operation after the other, each rounded. The oracle sees the same bfloat16
inputs. A ratio below one means that rounding once is better; products alone come out at one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from finetune_kernels.layers.linear_group import LinearGroup, reference
from finetune_kernels.ops import adapted_activation, attention, gated_activation, linear_cross_entropy, rms_norm
from finetune_kernels.ops import rotary_embedding as rotary
from finetune_kernels.ops.lora_linear import lora_linear
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.head_norm import HeadNorm
from finetune_kernels.primitives.lora_delta import LoraDelta
from finetune_test_kernels.tensor_checks import normal, root_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # a GPU's image has other versions than the lock, which warn of other things
]
RATIO = 1.1
T, HIDDEN, FEED_FORWARD = 2048, 4096, 14336
Tensors = Sequence[torch.Tensor]


def bf16(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (normal(*shape, seed=seed) * scale).bfloat16()


def compare(ours: Tensors, eager: Tensors, exact: Tensors, names: str) -> None:
    """Every tensor's error is at most RATIO times eager's; prints all of them."""
    table = {}
    for name, mine, other, oracle in zip(names.split(), ours, eager, exact, strict=True):
        assert mine.dtype == other.dtype
        table[name] = root_error(mine, oracle), root_error(other, oracle)
    print({name: f"{mine:.2e} of {other:.2e}: {mine / other:.3f}" for name, (mine, other) in table.items()})
    assert all(mine <= RATIO * other for mine, other in table.values()), table
    assert all(1e-5 < other < 0.05 for _, other in table.values()), f"the oracle does not judge this: {table}"


def by_autograd(call: Callable[..., torch.Tensor], inputs: Tensors, upstream: torch.Tensor) -> list[torch.Tensor]:
    """The result and the inputs' gradients."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    result = call(*leaves)
    return [result, *torch.autograd.grad(result, leaves, upstream.to(result.dtype))]


def eager_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def test_norm() -> None:
    x, dy, weight = bf16(T, HIDDEN), bf16(T, HIDDEN, seed=1), bf16(HIDDEN, seed=2, scale=0.2) + 1
    ours = by_autograd(lambda x: rms_norm.rms_norm(x, Norm(weight, 1e-5)), [x], dy)
    eager = by_autograd(lambda x: eager_norm(x, weight), [x], dy)
    exact = by_autograd(lambda x: rms_norm.reference(x, Norm(weight.double(), 1e-5)), [x.double()], dy)
    compare(ours, eager, exact, "y dx")


def test_norm_with_residual() -> None:
    x, delta, dy, dh = (bf16(T, HIDDEN, seed=seed) for seed in range(4))
    weight = bf16(HIDDEN, seed=4, scale=0.2) + 1
    norm = Norm(weight, 1e-5)
    h, y, rstd = rms_norm.forward(x, norm, delta=delta)
    dx, y_again = rms_norm.backward(dy, h, norm, rstd, residual=dh, return_y=True)
    assert torch.equal(y_again, y)

    def both(norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *tensors: torch.Tensor) -> list[torch.Tensor]:
        x, delta, dy, dh, weight = tensors
        h = (x + delta).requires_grad_()
        y = norm(h, weight)
        (dx,) = torch.autograd.grad([y, h * 1], [h], [dy, dh])
        return [h, y, dx]

    def formula(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm.reference(h, Norm(weight, 1e-5))

    exact = both(formula, *(value.double() for value in (x, delta, dy, dh, weight)))
    compare([h, y, dx], both(eager_norm, x, delta, dy, dh, weight), exact, "h y dx")


@pytest.mark.parametrize("with_norm", [False, True])
def test_rotation(with_norm: bool) -> None:
    heads = rotary.Heads(32, 8, 128)
    qkv, dy = bf16(T, heads.width), bf16(T, heads.width, seed=1)
    turns = torch.arange(T, device="cuda").outer(500000.0 ** -(torch.arange(64, device="cuda") / 64))
    cos, sin = (torch.cat((part, part), dim=1).bfloat16() for part in (turns.cos(), turns.sin()))
    weights = [bf16(128, seed=seed, scale=0.2) + 1 for seed in (2, 3)]
    norm = HeadNorm(*weights, 1e-6) if with_norm else None
    exact_norm = HeadNorm(*(weight.double() for weight in weights), 1e-6) if with_norm else None

    def eager(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = heads.split(qkv)
        if with_norm:
            q, k = eager_norm(q, weights[0], 1e-6), eager_norm(k, weights[1], 1e-6)
        turned = []
        for part in (q, k):
            first, second = part.chunk(2, dim=-1)
            turned.append(part * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1))
        return torch.cat((*turned, v), dim=1).flatten(1)

    y = rotary.forward(qkv.clone(), cos, sin, heads, norm)
    dx = rotary.backward(heads.split(dy), qkv, cos, sin, heads, norm)
    exact = by_autograd(
        lambda qkv: rotary.reference(qkv, cos.double(), sin.double(), heads, exact_norm), [qkv.double()], dy
    )
    compare([y, dx], by_autograd(eager, [qkv], dy), exact, "y dx")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activation(activation: Any) -> None:
    inputs, dy = [bf16(T, FEED_FORWARD), bf16(T, FEED_FORWARD, seed=1)], bf16(T, FEED_FORWARD, seed=2)

    def eager(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        active = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
        return active * up

    ours = by_autograd(lambda *values: gated_activation.gated_activation(*values, activation), inputs, dy)
    exact = by_autograd(
        lambda *values: gated_activation.reference(*values, activation), [value.double() for value in inputs], dy
    )
    compare(ours, by_autograd(eager, inputs, dy), exact, "y dgate dup")


@pytest.mark.parametrize("rank", [16, 64])
def test_adapted_activation(rank: int) -> None:
    """Eager: peft's sums on the way in and on the way back, SwiGLU in between."""
    gate_up, dy = bf16(T, 2 * FEED_FORWARD), bf16(T, FEED_FORWARD, seed=1)
    inner, d = bf16(T, 2 * rank, seed=2, scale=0.2), bf16(T, rank, seed=3, scale=0.2)
    b, a = bf16(2, FEED_FORWARD, rank, seed=4, scale=0.2), bf16(rank, FEED_FORWARD, seed=5, scale=0.2)
    halves = inner[:, :rank], inner[:, rank:]
    deltas = tuple(LoraDelta(half, part.contiguous(), 2.0) for half, part in zip(halves, b, strict=True))

    def eager(kind: torch.dtype) -> list[torch.Tensor]:
        parts = [part.to(kind) for part in gate_up.chunk(2, dim=1)]
        parts = [
            part + 2.0 * (half.to(kind) @ one.to(kind).T) for part, half, one in zip(parts, halves, b, strict=True)
        ]
        whole = dy.to(kind) + d.to(kind) @ a.to(kind)
        return by_autograd(lambda gate, up: functional.silu(gate) * up, parts, whole)

    y = adapted_activation.forward(gate_up, "silu", deltas)  # type: ignore[arg-type]
    activations = dy.clone()
    gradient = adapted_activation.backward(activations, gate_up, "silu", deltas, (d, a))  # type: ignore[arg-type]
    assert root_error(activations, y) < 1e-3  # made again: fused multiply-adds may differ
    compare([y, *gradient.chunk(2, dim=1)], eager(torch.bfloat16), eager(torch.float64), "y dgate dup")


def test_lora_linear() -> None:
    w, bias, dy = bf16(HIDDEN, HIDDEN, seed=1, scale=0.02), bf16(HIDDEN, seed=2), bf16(T, HIDDEN, seed=5)
    inputs = [bf16(T, HIDDEN), bf16(16, HIDDEN, seed=3, scale=0.02), bf16(HIDDEN, 16, seed=4, scale=0.2)]

    def eager(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        kind = x.dtype
        return functional.linear(x, w.to(kind), bias.to(kind)) + functional.linear(functional.linear(x, a), b) * 2.0

    ours = by_autograd(lambda x, a, b: lora_linear(x, lambda: w, a, b, 2.0, bias), inputs, dy)
    exact = by_autograd(eager, [value.double() for value in inputs], dy)
    compare(ours, by_autograd(eager, inputs, dy), exact, "y dx da db")


@pytest.mark.parametrize("rank", [1, 16, 128, 512])
def test_linears_as_one(rank: int) -> None:
    torch.manual_seed(0)
    sizes = {"q_proj": 2048, "k_proj": 512, "v_proj": 512}
    plain = torch.nn.ModuleDict({name: torch.nn.Linear(2048, size, bias=True) for name, size in sizes.items()})
    get_peft_model(plain, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(sizes)))  # type: ignore[arg-type]
    for name, parameter in plain.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "bias" in name else 0.02)
    layers = list(plain.to("cuda", torch.bfloat16).values())
    group = LinearGroup(layers, torch.bfloat16, keep_dequantized=True)
    x, dy = bf16(T, 2048), bf16(T, 3072, seed=1)
    with torch.no_grad():
        pass_ctx = group.begin(None)
        y, xa = group.forward(x, pass_ctx)
        dx, d_xa = group.backward(dy, pass_ctx)
        ours = [y, dx, *group.gradients(dy, x, xa, d_xa, pass_ctx)]

    def by_peft(kind: torch.dtype) -> list[torch.Tensor]:
        for layer in layers:
            layer.to(kind)
        leaf = x.to(kind).requires_grad_()
        result = reference(layers, leaf)
        return [result, *torch.autograd.grad(result, [leaf, *group.parameters], dy.to(kind))]

    eager = by_peft(torch.bfloat16)
    names = "y dx" + "".join(f" da_{name} db_{name}" for name in "qkv")
    compare(ours, eager, by_peft(torch.float64), names)


@pytest.mark.parametrize("vocabulary", [32_064, 32_001])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_head(softcap: float | None, vocabulary: int) -> None:
    """Losses of 64 batches, not of one: a single sum's error is a matter of luck."""
    weight = bf16(vocabulary, 2048, seed=1, scale=0.04)
    draw = torch.Generator(device="cuda").manual_seed(0)
    targets = torch.randint(vocabulary, (64, 37), device="cuda", generator=draw)
    one = torch.ones((), device="cuda")

    def side(head: Callable[..., torch.Tensor], kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """All losses, and all gradients of the hidden rows."""
        found = []
        for seed, wanted in enumerate(targets):
            inputs = [bf16(37, 2048, seed=seed).to(kind)]
            found.append(by_autograd(lambda rows, w=wanted: head(rows, weight.to(kind), w, softcap), inputs, one))
        return torch.stack([loss for loss, _ in found]), torch.cat([gradient for _, gradient in found])

    ours = side(linear_cross_entropy.linear_cross_entropy, torch.bfloat16)
    eager = side(linear_cross_entropy.reference, torch.bfloat16)
    exact = side(linear_cross_entropy.reference, torch.float64)
    error, others = root_error(ours[0], exact[0]), root_error(eager[0], exact[0])
    print(f"loss: {error:.2e} of {others:.2e}")
    assert error <= RATIO * others
    compare(ours[1:], eager[1:], exact[1:], "dhidden")


@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(64, torch.bfloat16), (128, torch.bfloat16), (512, torch.bfloat16), (512, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(1024, 1024), (1, 7, 300, 1029, 711)], ids=["batch", "varied"])
def test_attention(lengths: tuple[int, ...], size: int, dtype: torch.dtype, has_sinks: bool) -> None:
    """Eager: products and softmax as transformers' eager attention has them, document by document."""
    t, scale = sum(lengths), size**-0.5
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    sequences = PackedSequences(ends, max(lengths), t, comes_again=True)  # a batch is cuDNN's, where that is used
    inputs = [bf16(t, count, size, seed=count + seed).to(dtype) for seed, count in enumerate((16, 4, 4))]
    dout = bf16(t, 16, size, seed=9).to(dtype)
    sinks = bf16(16, seed=11).to(dtype) if has_sinks else None
    qkv, params = Qkv(*inputs), AttentionParams(scale, sinks=sinks)
    out, saved = attention.forward(qkv, sequences, params)
    ours = [out, *attention.backward(dout, qkv, out, saved, sequences, params)]

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outs = []
        for one in zip(*(part.split(lengths) for part in (q, k, v)), strict=True):
            one_q, one_k, one_v = (part.transpose(0, 1).repeat_interleave(16 // part.shape[1], 0) for part in one)
            scores = one_q @ one_k.transpose(1, 2) * scale
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device="cuda").triu(1)
            scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
            if sinks is not None:  # as transformers' gpt-oss has them
                scores = torch.cat((scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)), dim=-1)
            scores = scores.softmax(-1, dtype=torch.float32)[..., : one_k.shape[1]]
            outs.append((scores.to(q.dtype) @ one_v).transpose(0, 1))
        return torch.cat(outs)

    wide = [value.double() for value in inputs]
    exact = by_autograd(lambda q, k, v: attention.reference(Qkv(q, k, v), sequences, params), wide, dout)
    compare(ours, by_autograd(eager, inputs, dout), exact, "out dq dk dv")


def test_the_comparison_notices_one_rounding_too_many() -> None:
    """A norm whose scale is rounded to bfloat16 as well."""
    x, dy, weight = bf16(T, HIDDEN), bf16(T, HIDDEN, seed=1), bf16(HIDDEN, seed=2, scale=0.2) + 1

    def coarse(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5).to(x.dtype)
        return weight * ((x * scale) * torch.ones_like(x)).to(x.dtype)

    eager = by_autograd(lambda x: eager_norm(x, weight), [x], dy)
    exact = by_autograd(lambda x: rms_norm.reference(x, Norm(weight.double(), 1e-5)), [x.double()], dy)
    with pytest.raises(AssertionError):
        compare(by_autograd(coarse, [x], dy), eager, exact, "y dx")
