"""Every gradient that is written by hand against numerical differentiation, in fp64.

These formulas are what the kernels are compared with (test_ops.py, test_layer_kernels.py), line by line the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.gradcheck import GradcheckError, gradcheck

from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.ops import (
    adapted_activation,
    attention,
    gated_activation,
    linear_cross_entropy,
    plain_activation,
    rms_norm,
    softcap_attention,
)
from finetune_kernels.ops import rotary_embedding as rotary
from finetune_kernels.ops.lora_linear import lora_linear
from finetune_kernels.ops.plain_activation import PlainKind
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.primitives.adapter_dropout import DropoutSeed
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.head_norm import HeadNorm
from finetune_kernels.primitives.lora_delta import LoraDelta
from finetune_test_kernels.tensor_checks import normal, relative_error

STRICT = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-6}  # central differences in fp64 are good to about 1e-9 here
Tensors = Sequence[torch.Tensor]


class Twin(torch.autograd.Function):
    """Autograd around a forward and a backward formula: `back` takes the upstream gradients, then the inputs."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], back: Callable[..., Tensors], *inputs: torch.Tensor) -> Any:
        ctx.back = back
        ctx.save_for_backward(*inputs)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        return None, None, *ctx.back(*upstream, *ctx.saved_tensors)


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return normal(*shape, seed=seed, dtype=torch.float64, device="cpu")


def norm_case(offset: float, *, centered: bool = False) -> tuple[Any, ...]:
    norm = Norm(double(5, seed=1), 1e-5, offset, centered, double(5, seed=2) if centered else None)

    def run(x: torch.Tensor) -> torch.Tensor:
        return rms_norm.reference(x, norm)

    def back(dy: torch.Tensor, x: torch.Tensor) -> Tensors:
        _, _, rstd = rms_norm.reference_forward(x, norm)
        return rms_norm.reference_backward(dy, x, norm, rstd)[:1]

    return run, back, [double(3, 5)]


def residual_norm_case() -> tuple[Any, ...]:
    norm = Norm(double(5, seed=1), 1e-5, 1.0)

    def run(x: torch.Tensor, delta: torch.Tensor) -> Tensors:
        return rms_norm.reference_forward(x, norm, delta)[:2]

    def back(dh: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, delta: torch.Tensor) -> Tensors:
        h, y, rstd = rms_norm.reference_forward(x, norm, delta)
        dx, again = rms_norm.reference_backward(dy, h, norm, rstd, dh, return_y=True)
        assert relative_error(again, y) < 1e-14
        return dx, dx

    return run, back, [double(3, 5), double(3, 5, seed=2)]


def rotary_case(place: Any, size: int = 4, *, pairs: bool = False, value: bool = False) -> tuple[Any, ...]:
    heads, angles = rotary.Heads(3, 2, size, pairs), double(5, 2, seed=3)
    widths = (3 * size, 2 * size) if place == "row" else (size, size)
    norm = HeadNorm(double(widths[0], seed=4), double(widths[1], seed=5), 1e-5, place, value) if place else None
    cos, sin = (torch.cat((part, part), dim=1) for part in (angles.cos(), angles.sin()))

    def run(qkv: torch.Tensor) -> torch.Tensor:
        return rotary.reference(qkv, cos, sin, heads, norm)

    def back(dy: torch.Tensor, qkv: torch.Tensor) -> Tensors:
        return [rotary.reference_backward(heads.split(dy), qkv, cos, sin, heads, norm)]

    return run, back, [double(5, heads.width)]


def plain_case(kind: PlainKind) -> tuple[Any, ...]:
    delta = LoraDelta(double(3, 2, seed=1), double(5, 2, seed=2), 0.7)

    def run(x: torch.Tensor) -> torch.Tensor:
        return plain_activation.reference(x, kind, delta)

    def back(dy: torch.Tensor, x: torch.Tensor) -> Tensors:
        return [plain_activation.reference_backward(dy.clone(), x, kind, delta, None)]

    return run, back, [2 * double(3, 5)]


def gated_case(activation: gated_activation.Activation) -> tuple[Any, ...]:
    def run(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gated_activation.reference(gate, up, activation)

    def back(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Tensors:
        return gated_activation.reference_backward(dy, gate, up, activation)

    return run, back, [2 * double(3, 5), double(3, 5, seed=1)]


def adapted_case(activation: gated_activation.Activation, sides: str) -> tuple[Any, ...]:
    """y and y A^T, so that backward gets dy without the adapter's share, and d."""
    ranks = {"gate": 1, "up": 3}
    made = [LoraDelta(double(3, r, seed=r), double(5, r, seed=9 + r), 0.7) for r in ranks.values()]
    deltas = tuple(delta if name in sides else None for name, delta in zip(ranks, made, strict=True))
    a = double(2, 5, seed=6)

    def run(gate_up: torch.Tensor) -> Tensors:
        y = adapted_activation.reference(gate_up, activation, deltas)  # type: ignore[arg-type]
        return y, y @ a.T

    def back(dy: torch.Tensor, d: torch.Tensor, gate_up: torch.Tensor) -> Tensors:
        y = dy.clone()
        found = adapted_activation.reference_backward(y, gate_up, activation, deltas, (d, a))  # type: ignore[arg-type]
        assert relative_error(y, run(gate_up)[0]) < 1e-14
        return [found]

    return run, back, [double(3, 10)]


def head_case(softcap: float | None) -> tuple[Any, ...]:
    weight, targets = double(11, 5, seed=1), torch.tensor([0, 10, 4, 4])

    def run(hidden: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy.reference(hidden, weight, targets, softcap)

    def back(scale: torch.Tensor, hidden: torch.Tensor) -> Tensors:
        return [scale * linear_cross_entropy.reference_gradient(hidden, weight, targets, softcap)]

    return run, back, [double(4, 5)]


def adapted_linears(names: Sequence[str], targets: Sequence[str], *, bias: bool, **adapter: Any) -> list[Any]:
    """Linear layers of 6 inputs, as peft wraps them: ranks 1 and 3, in fp64."""
    torch.manual_seed(0)
    sizes = dict(zip(names, (4, 4, 8), strict=False))
    plain = torch.nn.ModuleDict({name: torch.nn.Linear(6, size, bias=bias) for name, size in sizes.items()})
    options: dict[str, Any] = {"r": 3, "rank_pattern": {names[-1]: 1}, "lora_alpha": 5} | adapter
    get_peft_model(plain, LoraConfig(target_modules=list(targets), **options))  # type: ignore[arg-type]
    for parameter in plain.double().parameters():
        torch.nn.init.normal_(parameter)
    return [plain[name] for name in names]


def group_case(
    names: Sequence[str], targets: Sequence[str], *, bias: bool = False, dropout: float = 0.0, **adapter: Any
) -> tuple[Any, ...]:
    linears = adapted_linears(names, targets, bias=bias, lora_dropout=dropout, **adapter)
    group = LinearGroup(linears, torch.float64, keep_dequantized=True)
    assert group.begin(DropoutSeed(5)).drops == (dropout > 0)

    def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return group.forward(x, group.begin(DropoutSeed(5, first_row=3)))[0]

    def back(dy: torch.Tensor, x: torch.Tensor, *_: torch.Tensor) -> Tensors:
        pass_ctx = group.begin(DropoutSeed(5, first_row=3))
        dx, d_xa = group.backward(dy, pass_ctx)
        return [dx, *group.gradients(dy, x, group.xa(x, pass_ctx), d_xa, pass_ctx)]

    return run, back, [double(5, 6), *group.parameters]


def attention_case(window: int | None) -> tuple[Any, ...]:
    sequences = PackedSequences(torch.tensor([0, 1, 4, 9], dtype=torch.int32), 5, 9)
    params = AttentionParams(0.6, window)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention.forward(Qkv(q, k, v), sequences, params)[0]

    def back(dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        out, saved = attention.forward(Qkv(q, k, v), sequences, params)
        assert relative_error(out, attention.reference(Qkv(q, k, v), sequences, params)) < 1e-12
        return attention.backward(dout, Qkv(q, k, v), out, saved, sequences, params)

    return run, back, [double(9, 4, 4), double(9, 2, 4, seed=1), double(9, 2, 4, seed=2)]


def softcap_case(window: int | None) -> tuple[Any, ...]:
    sequences, params = PackedSequences.of_length(5, 1, torch.device("cpu")), AttentionParams(0.6, window, 1.5)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return softcap_attention.reference(Qkv(q, k, v), sequences, params)

    def back(dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        return softcap_attention.reference_backward(dout, Qkv(q, k, v), sequences, params)

    return run, back, [double(5, 4, 4), double(5, 2, 4, seed=1), double(5, 2, 4, seed=2)]


QKV = ("q_proj", "k_proj", "v_proj")
CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "norm": lambda: norm_case(0.0),
    "norm with offset": lambda: norm_case(1.0),
    "layer norm": lambda: norm_case(0.0, centered=True),
    "residual norm": residual_norm_case,
    "rotation": lambda: rotary_case(None),
    "rotation of pairs": lambda: rotary_case(None, pairs=True),
    "rotation after a head norm": lambda: rotary_case("head"),
    "rotation after a norm of v as well": lambda: rotary_case("head", value=True),
    "rotation of a part, after a head norm": lambda: rotary_case("head", 6),
    "rotation of a part, after a norm of the row": lambda: rotary_case("row", 6, pairs=True),
    "rotation before a head norm": lambda: rotary_case("rotated head", 6),
    "squared ReLU": lambda: plain_case(PlainKind("relu2")),
    "GELU without a gate": lambda: plain_case(PlainKind("gelu_tanh")),
    "xIELU": lambda: plain_case(PlainKind("xielu", 0.7, 1.1)),
    "SwiGLU": lambda: gated_case("silu"),
    "GeGLU": lambda: gated_case("gelu_tanh"),
    "SwiGLU with adapters": lambda: adapted_case("silu", "gate up"),
    "SwiGLU with an adapter on one side": lambda: adapted_case("silu", "up"),
    "GeGLU with adapters": lambda: adapted_case("gelu_tanh", "gate up"),
    "head": lambda: head_case(None),
    "head with a cap": lambda: head_case(2.0),
    "linears": lambda: group_case(QKV, QKV),
    "linears with bias and rsLoRA": lambda: group_case(QKV, QKV, bias=True, use_rslora=True),
    "linears with some adapters": lambda: group_case(QKV, ("q_proj", "v_proj"), bias=True),
    "linears with dropout": lambda: group_case(QKV, QKV, bias=True, dropout=0.3, use_rslora=True),
    "linears with some adapters and dropout": lambda: group_case(QKV, ("k_proj", "v_proj"), dropout=0.7),
    "linears with magnitudes": lambda: group_case(QKV, QKV, bias=True, use_dora=True, use_rslora=True),
    "linears with some magnitudes": lambda: group_case(QKV, ("q_proj", "v_proj"), use_dora=True),
    "one linear": lambda: group_case(("o_proj",), ("o_proj",)),
    "attention over documents": lambda: attention_case(None),
    "attention over documents, in a window": lambda: attention_case(3),
    "attention with capped scores": lambda: softcap_case(None),
    "attention with capped scores, in a window": lambda: softcap_case(2),
}


@pytest.mark.usefixtures("in_pytorch", "constant_norms")
@pytest.mark.parametrize("name", CASES)
def test_a_gradient_is_that_of_the_formula(name: str) -> None:
    run, back, inputs = CASES[name]()
    inputs = [value.requires_grad_() for value in inputs]
    assert gradcheck(lambda *values: Twin.apply(run, back, *values), inputs, **STRICT)

    def off(*values: torch.Tensor) -> Tensors:
        first, *rest = back(*values)
        return [first * 1.0001, *rest]

    with pytest.raises(GradcheckError):
        gradcheck(lambda *values: Twin.apply(run, off, *values), inputs, **STRICT)


@pytest.mark.parametrize("bias", [None, double(5, seed=4)], ids=["plain", "bias"])
def test_lora_linear(bias: torch.Tensor | None) -> None:
    w = double(5, 4, seed=1)
    inputs = [double(2, 3, 4), double(2, 4, seed=2), double(5, 2, seed=3)]
    inputs = [value.requires_grad_() for value in inputs]
    assert gradcheck(lambda x, a, b: lora_linear(x, lambda: w, a, b, 0.7, bias), inputs, **STRICT)
