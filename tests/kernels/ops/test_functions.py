"""Autograd Functions that layers do not use, as they call `forward` and `backward` themselves: kernels under autograd
against the references under autograd, and in fp64 against numerical differentiation."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck

from finetune_kernels.ops import adapted_activation, attention, rotary_embedding, softcap_attention
from finetune_kernels.ops.adapted_activation import AdaptedActivationFunction, LoraDeltas
from finetune_kernels.ops.gated_activation import Activation
from finetune_kernels.ops.rotary_embedding import Heads, RotaryEmbeddingFunction
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.head_norm import HeadNorm
from finetune_kernels.primitives.lora_delta import LoraDelta
from finetune_test_kernels.tensor_checks import DEVICE, normal, relative_error

TOLERANCE = 5e-6 if DEVICE == "cpu" else 5e-3  # fp32; 1e-6 was measured; a GPU multiplies fp32 tiles in TF32
STRICT = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-6}
Call = Callable[..., torch.Tensor]
SIDES = ["gate up", "gate", "up", ""]


def errors(ours: Call, formula: Call, inputs: list[torch.Tensor]) -> list[float]:
    """Relative errors of the result and of all gradients; the formula is evaluated in fp64."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    exact = [value.double().requires_grad_() for value in inputs]
    found, expected = ours(*leaves), formula(*exact)
    upstream = normal(*expected.shape, seed=20)
    pairs = zip(
        (found, *torch.autograd.grad(found, leaves, upstream)),
        (expected, *torch.autograd.grad(expected, exact, upstream.double())),
        strict=True,
    )
    return [relative_error(mine, truth) for mine, truth in pairs]


def adapted_inputs(sides: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """gate and up side by side, then xa and B for each side that has an adapter; ranks 3 and 5."""
    shapes = [(13, 40)]
    for side, rank in (("gate", 3), ("up", 5)):
        shapes += [(13, rank), (20, rank)] if side in sides else []
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def flat_deltas(sides: str, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor | float | None]:
    """Arguments of the Function: xa, B and the scale of both sides."""
    rest, flat = list(tensors), []
    for side, scale in (("gate", 0.5), ("up", 1.5)):
        flat += [rest.pop(0), rest.pop(0), scale] if side in sides else [None, None, 0.0]
    return flat


def deltas_of(sides: str, tensors: tuple[torch.Tensor, ...]) -> LoraDeltas:
    flat = flat_deltas(sides, tensors)
    found = [None if flat[at] is None else LoraDelta(*flat[at : at + 3]) for at in (0, 3)]  # type: ignore[arg-type]
    return found[0], found[1]


def adapted_by_function(sides: str, activation: Activation) -> Call:
    def ours(gate_up: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = AdaptedActivationFunction.apply(gate_up, activation, *flat_deltas(sides, tensors))
        return result

    return ours


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("sides", SIDES)
def test_adapted_activation(sides: str, activation: Activation) -> None:
    def formula(gate_up: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return adapted_activation.reference(gate_up, activation, deltas_of(sides, tensors))

    def public(gate_up: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return adapted_activation.adapted_activation(gate_up, activation, deltas_of(sides, tensors))

    inputs = adapted_inputs(sides)
    assert max(errors(adapted_by_function(sides, activation), formula, inputs)) < TOLERANCE
    assert max(errors(public, formula, inputs)) < TOLERANCE
    other = "silu" if activation == "gelu_tanh" else "gelu_tanh"
    assert min(errors(adapted_by_function(sides, other), formula, inputs)[:2]) > 100 * TOLERANCE


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.usefixtures("in_pytorch")
def test_adapted_activations_gradient_is_the_numerical_one(sides: str, activation: Activation) -> None:
    inputs = [value.cpu().requires_grad_() for value in adapted_inputs(sides, torch.float64)]
    ours = adapted_by_function(sides, activation)
    assert gradcheck(ours, inputs, **STRICT)
    if sides:  # a scale that backward does not know of
        with pytest.raises(GradcheckError):
            gradcheck(lambda gate_up, *rest: ours(gate_up, 1.01 * rest[0].detach(), *rest[1:]), inputs, **STRICT)


def test_adapted_activation_leaves_its_inputs_and_the_upstream_gradient() -> None:
    inputs = [value.requires_grad_() for value in adapted_inputs("gate up")]
    before = [value.detach().clone() for value in inputs]
    y = adapted_by_function("gate up", "silu")(*inputs)
    upstream = normal(*y.shape, seed=20)
    kept = upstream.clone()
    torch.autograd.grad(y, inputs, upstream)
    assert torch.equal(upstream, kept)
    assert all(torch.equal(value, old) for value, old in zip(inputs, before, strict=True))


@pytest.mark.parametrize("with_norm", [False, True])
def test_rotary_embedding(with_norm: bool) -> None:
    heads, angles = Heads(3, 1, 16), normal(5, 6, seed=3)
    cos, sin = (torch.cat((part, part), dim=1) for part in (angles.cos(), angles.sin()))  # 12 of 16 elements
    norm = HeadNorm(normal(16, seed=4), normal(16, seed=5), 0.1) if with_norm else None
    qkv = normal(5, heads.width)
    before = qkv.clone()

    def ours(qkv: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = RotaryEmbeddingFunction.apply(qkv, cos, sin, heads, norm)
        return result

    def formula(qkv: torch.Tensor) -> torch.Tensor:
        return rotary_embedding.reference(qkv, cos, sin, heads, norm)

    def public(qkv: torch.Tensor) -> torch.Tensor:
        return rotary_embedding.rotary_embedding(qkv, cos, sin, heads, norm)

    assert max(errors(ours, formula, [qkv])) < TOLERANCE
    assert max(errors(public, formula, [qkv])) < TOLERANCE
    assert torch.equal(qkv, before)
    assert min(errors(lambda qkv: ours(qkv.roll(1, 0)), formula, [qkv])) > 0.1


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU attention takes 16-bit types: test_gpu_kernels.py")
@pytest.mark.parametrize("window", [None, 4])
def test_attention_with_sinks(window: int | None) -> None:
    sequences = PackedSequences(torch.tensor([0, 1, 8, 20], dtype=torch.int32), 12, 20)
    params = AttentionParams(0.3, window, sinks=2 * normal(4, seed=7))
    inputs = [2 * normal(20, heads, 16, seed=seed) for seed, heads in enumerate((4, 2, 2))]

    def ours(*parts: torch.Tensor) -> torch.Tensor:
        return attention.attention(Qkv(*parts), sequences, params)

    def formula(*parts: torch.Tensor) -> torch.Tensor:
        return attention.reference(Qkv(*parts), sequences, params)

    def without(*parts: torch.Tensor) -> torch.Tensor:
        return attention.attention(Qkv(*parts), sequences, replace(params, sinks=None))

    assert max(errors(ours, formula, inputs)) < 1e-5
    assert min(errors(without, formula, inputs)) > 0.1


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU attention takes 16-bit types: test_gpu_kernels.py")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
def test_attention_and_softcap_attention(window: int | None, softcap: float | None) -> None:
    sequences = PackedSequences(torch.tensor([0, 1, 8, 20], dtype=torch.int32), 12, 20)
    params = AttentionParams(0.3, window, softcap)
    inputs = [2 * normal(20, heads, 16, seed=seed) for seed, heads in enumerate((4, 2, 2))]

    def formula(*parts: torch.Tensor) -> torch.Tensor:
        return attention.reference(Qkv(*parts), sequences, params)

    def by(operation: Call, params: AttentionParams) -> Call:
        return lambda *parts: operation(Qkv(*parts), sequences, params)

    other = AttentionParams(0.31, window, softcap)
    for operation in [attention.attention] + ([softcap_attention.softcap_attention] if softcap else []):
        assert max(errors(by(operation, params), formula, inputs)) < 1e-5
        assert min(errors(by(operation, other), formula, inputs)) > 1e-3
