"""Promises to callers: what autograd saved and what they passed in stays as it was, strides do not matter, and a batch
without supervised tokens or without rows is harmless."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from finetune_kernels.layers import supervised_loss as fused_loss
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.ops.gated_activation import GatedActivationFunction
from finetune_kernels.ops.linear_cross_entropy import LinearCrossEntropyFunction
from finetune_kernels.ops.lora_linear import lora_linear
from finetune_kernels.ops.rms_norm import Norm, RmsNormFunction
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_test_kernels.small_layers import cos_sin_of, small_model
from finetune_test_kernels.tensor_checks import DEVICE, gradients, normal, relative_error, watched
from finetune_trainer.chat.labels import IGNORED
from finetune_trainer.training.collator import collate_packed

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="in the interpreter; test_gpu_limits.py and test_gpu_layers.py are for a GPU"
)
Call = Callable[..., torch.Tensor]
# Name -> family, and the adapter's options.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    family: (family, {}) for family in ("llama", "qwen2", "qwen3", "phi3")
} | {
    "gemma2": ("gemma2", {}),
    "gemma2 with dropout": ("gemma2", {"lora_dropout": 0.3}),
    "qwen2 with dropout": ("qwen2", {"lora_dropout": 0.3}),
    "qwen2 with DoRA": ("qwen2", {"use_dora": True}),
    "gemma2 with DoRA": ("gemma2", {"use_dora": True}),
}


def norm(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = RmsNormFunction.apply(x, Norm(normal(x.shape[-1], seed=9), 1e-5, 1.0))
    return result


def gated(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = GatedActivationFunction.apply(gate, up, activation)
    return result


def head(softcap: float | None, hidden: torch.Tensor) -> torch.Tensor:
    targets = spread(torch.arange(hidden.shape[0], device=DEVICE) * 7 % 50)
    weight = normal(50, hidden.shape[1], seed=9)
    result: torch.Tensor = LinearCrossEntropyFunction.apply(hidden, weight, targets, softcap)
    return result


def lora(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return lora_linear(x, lambda: normal(b.shape[0], x.shape[-1], seed=9), a, b, 0.5, normal(b.shape[0], seed=8))


CALLS: dict[str, tuple[Call, list[tuple[int, ...]]]] = {
    "norm": (norm, [(3, 5, 40)]),
    "SwiGLU": (partial(gated, "silu"), [(3, 5, 40)] * 2),
    "GeGLU": (partial(gated, "gelu_tanh"), [(3, 5, 40)] * 2),
    "head": (partial(head, None), [(5, 40)]),
    "head with a cap": (partial(head, 5.0), [(5, 40)]),
    "LoRA linear": (lora, [(3, 5, 40), (2, 40), (24, 2)]),
}


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values with a stride of two in the last dimension; in between lies what must not be read."""
    other = torch.full_like(x, float("nan") if x.is_floating_point() else 2**40)
    return torch.stack((x, other), dim=-1)[..., 0]


@pytest.mark.parametrize("name", CALLS)
def test_a_function_leaves_alone_what_it_saved_and_was_given(name: str) -> None:
    call, shapes = CALLS[name]
    inputs = [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    copies = [value.detach().clone() for value in inputs]
    with watched() as guard:
        result = call(*inputs)
    upstream = normal(*result.shape, seed=5)
    kept = upstream.clone()
    first, second = gradients(result, upstream, inputs), gradients(result, upstream, inputs)

    assert guard.entries
    assert not guard.changed()
    assert torch.equal(upstream, kept)
    for value, copy in zip(inputs, copies, strict=True):
        assert torch.equal(value, copy)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", CALLS)
def test_strides_change_nothing(name: str) -> None:
    call, shapes = CALLS[name]
    plain = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    found = []
    for lay_out in (torch.clone, spread):
        inputs = [lay_out(value).requires_grad_() for value in plain]
        result = call(*inputs)
        found.append([result, *gradients(result, lay_out(normal(*result.shape, seed=5)), inputs)])
    assert inputs[0].stride() != plain[0].stride()
    for expected, ours in zip(*found, strict=True):
        assert relative_error(ours, expected) < 1e-5  # products may sum in another order


class Careless(torch.autograd.Function):
    """Writes into what it saved, past the version counter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return dy * x.data.mul_(2)


def test_the_guard_sees_a_function_that_writes_into_what_it_saved() -> None:
    x = normal(4).requires_grad_()
    with watched() as guard:
        y = Careless.apply(x)
    gradients(y, torch.ones_like(y), [x])
    assert guard.changed() == ["saved tensor 0 (4,) torch.float32"]


def layer_call(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The model's one layer over documents of 3, 1 and 4 tokens."""
    causal = model.get_base_model()
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]], device=DEVICE)
    ends = torch.tensor([0, 3, 4, 8], dtype=torch.int32, device=DEVICE)
    cos_sin = cos_sin_of(causal, x, positions)
    layer = causal.model.layers[0]
    result: torch.Tensor = layer(x, position_embeddings=cos_sin, cu_seq_lens_q=ends, max_length_q=4)
    return result


def fused(
    family: str, policy: ActivationPolicy, *, layers: int = 1, **adapter: Any
) -> tuple[Any, list[torch.nn.Parameter]]:
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    model = small_model(family, dtype, layers=layers, **adapter).to(DEVICE)
    FusedLayers(model.get_base_model(), [policy] * layers, dtype, keep_dequantized=True)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    "policy", [ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.RECOMPUTE_ALL]
)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_leaves_alone_what_it_saved_and_was_given(name: str, policy: ActivationPolicy) -> None:
    family, adapter = LAYERS[name]
    model, parameters = fused(family, policy, **adapter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = normal(1, 8, 32, dtype=parameters[0].dtype).requires_grad_()
    copy = x.detach().clone()
    with watched() as guard:
        y = layer_call(model, x)
    upstream = normal(*y.shape, seed=5, dtype=y.dtype)
    kept = upstream.clone()
    first, second = gradients(y, upstream, [x, *parameters]), gradients(y, upstream, [x, *parameters])

    assert len(guard.entries) >= 3
    assert not guard.changed()
    assert torch.equal(x, copy)
    assert torch.equal(upstream, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("policy", [ActivationPolicy.SAVE_ALL, ActivationPolicy.OFFLOAD])
def test_strides_of_a_layers_input_change_nothing(policy: ActivationPolicy) -> None:
    found = []
    for lay_out in (torch.clone, spread):
        model, parameters = fused("llama", policy)
        x = lay_out(normal(1, 8, 32, dtype=parameters[0].dtype)).requires_grad_()
        y = layer_call(model, x)
        upstream = lay_out(normal(*y.shape, seed=5, dtype=y.dtype))
        found.append([y, *torch.autograd.grad(y, [x, *parameters], upstream)])
    for expected, ours in zip(*found, strict=True):
        assert torch.equal(ours, expected)


def batch_loss(model: Any, labels: list[int]) -> torch.Tensor:
    batch = collate_packed([{"input_ids": list(range(len(labels))), "labels": labels}])
    wanted, supervised = batch.pop("labels"), batch.pop("supervised")
    return fused_loss.fused_supervised_loss(model, batch, wanted, supervised, None)


def test_a_batch_without_supervised_tokens_has_no_loss_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "linear_cross_entropy", LinearCrossEntropyFunction.apply)
    model, parameters = fused("llama", ActivationPolicy.SAVE_ALL)
    labels = [IGNORED] * 8
    loss = batch_loss(model, labels)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, parameters):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    labels[5] = 3
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(batch_loss(model, labels), parameters))


@pytest.mark.parametrize("name", CALLS)
def test_no_rows_give_no_gradient(name: str) -> None:
    call, shapes = CALLS[name]
    first, *rest = shapes
    others = [(0, *shape[1:]) if shape == first else shape for shape in rest]
    inputs = [normal(*shape).requires_grad_() for shape in [(0, *first[1:]), *others]]
    result = call(*inputs)
    for value, gradient in zip(inputs, gradients(result, torch.ones_like(result), inputs), strict=True):
        assert gradient.shape == value.shape
        assert torch.equal(gradient, torch.zeros_like(value))


def test_rows_of_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 40, device=DEVICE, requires_grad=True)
    y = norm(x)
    assert torch.equal(y, torch.zeros_like(y))
    (gradient,) = gradients(y, torch.ones_like(y), [x])
    # 1 / sqrt(eps) times weight: large, but what the formula says.
    assert torch.allclose(gradient, (normal(40, seed=9) + 1).expand(2, -1) * 1e-5**-0.5)
