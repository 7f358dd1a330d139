"""The kernels of a whole layer against their formulas in fp64: T = 1 and prime, widths that fill no block, ranks from 1
to 512, every option. The formulas themselves are checked in test_gradients.py."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetune_kernels.layers import linear_group
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.ops import adapted_activation, attention, rms_norm
from finetune_kernels.ops import rotary_embedding as rotary
from finetune_kernels.ops.adapted_activation import LoraDeltas
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.head_norm import HeadNorm
from finetune_kernels.primitives.lora_delta import LoraDelta
from finetune_test_kernels.small_layers import LINEARS, cos_sin_of, small_model
from finetune_test_kernels.tensor_checks import DEVICE, doubled, normal, relative_error

TOLERANCE = 5e-6  # fp32; 7e-7 was measured over these shapes
PRODUCTS = TOLERANCE if DEVICE == "cpu" else 5e-3  # a GPU multiplies fp32 tiles in TF32
ROWS = [1, 13]


def exactly(formula: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """The formula in fp64."""
    return formula(*map(doubled, inputs), **{name: doubled(value) for name, value in options.items()})


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 96, 1000])
@pytest.mark.parametrize("t", ROWS)
def test_norm_with_residual(t: int, n: int, offset: float) -> None:
    x, delta, dy, dh = (normal(t, n, seed=seed) for seed in range(4))
    norm = Norm(normal(n, seed=4), 1e-5, offset)
    h, y, rstd = rms_norm.forward(x, norm, delta)
    exact_h, exact_y, exact_rstd = exactly(rms_norm.reference_forward, x, norm, delta)
    assert relative_error(h, exact_h) < TOLERANCE
    assert relative_error(y, exact_y) < TOLERANCE

    assert relative_error(rstd, exact_rstd) < TOLERANCE
    dx, again = rms_norm.backward(dy, h, norm, rstd, dh, return_y=True)
    inputs = (dy, exact_h, norm, exact_rstd, dh)
    assert relative_error(dx, exactly(rms_norm.reference_backward, *inputs)[0]) < TOLERANCE
    assert torch.equal(again, y)
    alone, _ = rms_norm.backward(dy, h, norm, rstd)
    expected, _ = exactly(rms_norm.reference_backward, *inputs[:-1])
    assert relative_error(alone + dh, expected + dh) < TOLERANCE  # over one element the gradient is zero but for eps


def angles(t: int, turning: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = normal(t, turning // 2, seed=7)
    cos, sin = (torch.cat((part, part), dim=1).contiguous() for part in (half.cos(), half.sin()))
    return cos, sin


@pytest.mark.parametrize("part", [1.0, 0.75, 0.0])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("place", [None, "head", "row", "rotated head"])
@pytest.mark.parametrize(("t", "query", "key_value", "size"), [(1, 1, 1, 16), (13, 3, 1, 24), (33, 8, 2, 64)])
def test_rotation(t: int, query: int, key_value: int, size: int, place: Any, pairs: bool, part: float) -> None:
    heads = rotary.Heads(query, key_value, size, pairs)
    widths = (query * size, key_value * size) if place == "row" else (size, size)
    norm = HeadNorm(normal(widths[0], seed=8), normal(widths[1], seed=9), 1e-5, place) if place else None
    exact = None if norm is None else replace(norm, query=norm.query.double(), key=norm.key.double())
    qkv, dy = normal(t, heads.width), normal(t, heads.width, seed=1)
    cos, sin = angles(t, int(size * part) // 4 * 4)
    source = qkv.clone()
    rotated = rotary.forward(source, cos, sin, heads, norm)

    assert relative_error(rotated, exactly(rotary.reference, qkv, cos, sin, heads, exact)) < TOLERANCE
    assert torch.equal(source, qkv) == (norm is not None or part == 0)  # in place without a norm
    expected = rotary.reference_backward(
        heads.split(dy.double()), qkv.double(), cos.double(), sin.double(), heads, exact
    )
    assert relative_error(rotary.backward(heads.split(dy), qkv, cos, sin, heads, norm), expected) < TOLERANCE


def deltas_of(t: int, f: int, ranks: tuple[int, int]) -> LoraDeltas:
    """inner's rows are strided, as slices of a group's x A^T are."""
    whole = normal(t, sum(ranks) + 3, seed=11) / 4
    first, second = whole[:, : ranks[0]], whole[:, ranks[0] : sum(ranks)]
    made = [
        LoraDelta(inner, normal(f, inner.shape[1], seed=12) / 4, scale) if inner.shape[1] else None
        for inner, scale in ((first, 0.5), (second, 1.5))
    ]
    return made[0], made[1]


def in_fp64(deltas: LoraDeltas) -> LoraDeltas:
    found = [None if s is None else LoraDelta(s.xa.double(), s.b.double(), s.scale) for s in deltas]
    return found[0], found[1]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("t", "f", "ranks", "after"),
    [
        (1, 1, (1, 1), 1),
        (13, 130, (7, 64), 7),
        (13, 257, (64, 0), 64),
        (33, 40, (0, 16), 33),
        (13, 130, (0, 0), 0),
        (300, 20, (8, 40), 3),
    ],
)
def test_adapted_activation(t: int, f: int, ranks: tuple[int, int], after: int, activation: Any) -> None:
    gate_up, dy, deltas = normal(t, 2 * f), normal(t, f, seed=1), deltas_of(t, f, ranks)
    follows = (normal(t, after + 2, seed=2)[:, :after], normal(after, f, seed=3)) if after else None
    y = adapted_activation.forward(gate_up, activation, deltas)
    expected = adapted_activation.reference(gate_up.double(), activation, in_fp64(deltas))

    assert relative_error(y, expected) < PRODUCTS
    before = gate_up.clone()
    activations, exact_dy = dy.clone(), dy.double()
    found = adapted_activation.backward(activations, gate_up, activation, deltas, follows)
    exact_follows = None if follows is None else (follows[0].double(), follows[1].double())
    exact = adapted_activation.reference_backward(
        exact_dy, gate_up.double(), activation, in_fp64(deltas), exact_follows
    )
    assert relative_error(found, exact) < PRODUCTS
    assert relative_error(activations, expected) < PRODUCTS
    assert torch.equal(gate_up, before)


def linears(rank: int, targets: tuple[str, ...], *, bias: bool, rslora: bool) -> list[Any]:
    """peft's layers over 40 inputs; the last has a rank of its own."""
    torch.manual_seed(0)
    sizes = {"q_proj": 24, "k_proj": 8, "v_proj": 8}
    plain = torch.nn.ModuleDict({name: torch.nn.Linear(40, size, bias=bias) for name, size in sizes.items()})
    options: dict[str, Any] = {"r": rank, "lora_alpha": 5, "use_rslora": rslora}
    options["rank_pattern"] = {targets[-1]: 3} if len(targets) > 1 else {}
    get_peft_model(plain, LoraConfig(target_modules=list(targets), **options))  # type: ignore[arg-type]
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return list(plain.to(DEVICE).values())


@pytest.mark.parametrize(
    ("rank", "targets", "bias", "rslora"),
    [
        (1, ("q_proj", "k_proj", "v_proj"), False, False),
        (7, ("q_proj", "k_proj", "v_proj"), True, True),
        (64, ("q_proj", "v_proj"), True, False),
        (128, ("k_proj",), False, True),
        (512, ("q_proj", "k_proj", "v_proj"), False, True),
    ],
)
@pytest.mark.parametrize("t", ROWS)
def test_linears_as_one(t: int, rank: int, targets: tuple[str, ...], bias: bool, rslora: bool) -> None:
    layers = linears(rank, targets, bias=bias, rslora=rslora)
    group = linear_group.LinearGroup(layers, torch.float32, keep_dequantized=True)
    x, dy = normal(t, 40), normal(t, 40, seed=1)
    with torch.no_grad():
        pass_ctx = group.begin(None)
        y, xa = group.forward(x, pass_ctx)
        dx, d_xa = group.backward(dy, pass_ctx)
        found = [dx, *group.gradients(dy, x, xa, d_xa, pass_ctx)]
    parameters = group.parameters

    assert len(parameters) == 2 * len(targets)
    for layer in layers:
        layer.double()
    exact_x = x.double().requires_grad_()
    expected = linear_group.reference(layers, exact_x)
    assert relative_error(y, expected.detach()) < TOLERANCE
    # The layers' parameters are the same objects, in fp64 now.
    exact = torch.autograd.grad(expected, [exact_x, *parameters], dy.double())
    for ours, truth in zip(found, exact, strict=True):
        assert relative_error(ours, truth) < TOLERANCE


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU attention takes 16-bit types: test_gpu_kernels.py")
@pytest.mark.parametrize("lengths", [(1,), (1, 7, 5), (4, 4, 4)])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "key_value"), [(4, 4), (6, 2), (3, 1)])
def test_attention_over_documents(lengths: tuple[int, ...], heads: int, key_value: int, window: int | None) -> None:
    t = sum(lengths)
    sequences, params = (
        PackedSequences(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths), t),
        AttentionParams(0.3, window),
    )
    inputs = [normal(t, count, 16, seed=count) for count in (heads, key_value, key_value)]
    dout = normal(t, heads, 16, seed=9)
    out, saved = attention.forward(Qkv(*inputs), sequences, params)
    found = attention.backward(dout, Qkv(*inputs), out, saved, sequences, params)
    exact = [value.double().requires_grad_() for value in inputs]
    expected = attention.reference(Qkv(*exact), sequences, params)

    assert relative_error(out, expected.detach()) < TOLERANCE
    for ours, truth in zip(found, torch.autograd.grad(expected, exact, dout.double()), strict=True):
        assert (ours - truth).abs().max() < TOLERANCE * max(1.0, float(truth.abs().max()))


def layer_results(model: Any, t: int, dtype: torch.dtype, policy: ActivationPolicy) -> dict[str, torch.Tensor]:
    """Output and gradients of a model's one layer as one function."""
    causal = model.to(dtype).get_base_model()
    FusedLayers(causal, [policy], dtype, keep_dequantized=True)
    x = normal(1, t, 32).to(dtype).requires_grad_()
    cos_sin = cos_sin_of(causal, x, torch.arange(t).unsqueeze(0))
    y = causal.model.layers[0](x, position_embeddings=cos_sin)
    inputs = {"x": x} | {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(y, list(inputs.values()), normal(1, t, 32, seed=1).to(dtype))
    return {"y": y.detach()} | dict(zip(inputs, found, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU attention takes 16-bit types: test_gpu_layers.py")
@pytest.mark.parametrize(
    ("kind", "t", "rank", "targets", "policy"),
    [
        ("llama", 1, 1, LINEARS, ActivationPolicy.SAVE_ALL),
        ("qwen2", 13, 7, LINEARS, ActivationPolicy.RECOMPUTE_MLP),
        ("qwen3", 13, 64, ["k_proj", "o_proj", "gate_proj"], ActivationPolicy.SAVE_ALL),
        ("phi3", 13, 128, LINEARS, ActivationPolicy.RECOMPUTE_ALL),
        ("mistral", 7, 1, ["down_proj"], ActivationPolicy.OFFLOAD),
        ("gemma2", 13, 7, LINEARS, ActivationPolicy.RECOMPUTE_MLP),
        ("gemma3_text", 13, 7, LINEARS, ActivationPolicy.SAVE_ALL),
    ],
)
def test_a_whole_layer(
    kind: str, t: int, rank: int, targets: list[str], policy: ActivationPolicy, request: pytest.FixtureRequest
) -> None:
    """Against itself in fp64, every kernel replaced by its formula."""
    model = small_model(kind, torch.float32, r=rank, target_modules=targets, use_rslora=True)
    found = layer_results(model, t, torch.float32, policy)
    request.getfixturevalue("in_pytorch")
    expected = layer_results(model, t, torch.float64, policy)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = max(1.0, float(value.abs().max()))  # over one token the gradients of q and k are zero
        assert float((found[name] - value).abs().max()) < 2 * TOLERANCE * largest, name
