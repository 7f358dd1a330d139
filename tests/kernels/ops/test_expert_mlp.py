"""A mixture of experts: output and all gradients by its formula, for routings from even to one expert for all."""

from functools import partial
from typing import Any

import pytest
import torch

from finetune_kernels.ops.expert_mlp import Activation, Mixture, expert_mlp, reference
from finetune_kernels.primitives.expert_projection import Projection
from finetune_kernels.primitives.grouped import low_rank, products
from finetune_test_kernels.tensor_checks import DEVICE, normal, relative_error

EXPERTS, HIDDEN, WIDE, RANK, TOKENS, CHOSEN = 4, 16, 24, 3, 13, 2
TOLERANCE = 2e-6  # fp32; at most 6e-7 was measured
HALVES = (slice(0, WIDE), slice(WIDE, 2 * WIDE))
ACTIVATIONS = {
    "silu": Activation("silu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "clamped": Activation("clamped", interleaved=True, alpha=1.702, limit=0.5),
}


def projection(rows: int, columns: int, outputs: tuple[slice, ...], *, bias: bool, dtype: torch.dtype) -> Projection:
    w, shift = normal(EXPERTS, rows, columns, seed=rows).to(dtype) / 4, normal(EXPERTS, rows, seed=7).to(dtype)
    return Projection(lambda kind: w.to(kind), shift if bias else None, (1.5,) * len(outputs), outputs)


def mixture(
    kind: str = "silu",
    *,
    bias: bool = False,
    scales_input: bool = False,
    fused: bool = False,
    dtype: Any = torch.float32,
) -> Mixture:
    return Mixture(
        EXPERTS,
        projection(2 * WIDE, HIDDEN, (slice(None),) if fused else HALVES, bias=bias, dtype=dtype),
        projection(HIDDEN, WIDE, (slice(None),), bias=bias, dtype=dtype),
        ACTIVATIONS[kind],
        scales_input,
    )


def factors(settings: Mixture, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    outs = [2 * WIDE] if len(settings.gate_up.scales) == 1 else [WIDE, WIDE]
    shapes = [shape for out in outs for shape in ((RANK, HIDDEN), (out, RANK))] + [(RANK, WIDE), (HIDDEN, RANK)]
    return [(normal(EXPERTS, *shape, seed=20 + n) / 4).to(dtype).requires_grad_() for n, shape in enumerate(shapes)]


def routing(name: str) -> torch.Tensor:
    """Experts of each token: all of them, two without a token, or the same two for every token."""
    drawn = {
        "even": torch.arange(TOKENS * CHOSEN) % EXPERTS,
        "two without a token": torch.tensor([0, 3] * TOKENS),
        "one that all take first": torch.tensor([value for n in range(TOKENS) for value in (2, n % 2)]),
    }[name]
    return drawn.view(TOKENS, CHOSEN).to(DEVICE)


def gradients(compute: Any, settings: Mixture, index: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of x, the weights and every factor."""
    x = normal(TOKENS, HIDDEN).requires_grad_()
    weights = normal(TOKENS, CHOSEN, seed=3).sigmoid().requires_grad_()
    parameters = factors(settings)
    out = compute(x, weights, index, settings, parameters)
    out.backward(normal(TOKENS, HIDDEN, seed=4))
    found = [out, x.grad, weights.grad, *(parameter.grad for parameter in parameters)]
    return [torch.zeros(1) if value is None else value for value in found]


def worst(settings: Mixture, index: torch.Tensor, other: Mixture | None = None) -> float:
    found, exact = gradients(expert_mlp, other or settings, index), gradients(reference, settings, index)
    return max(relative_error(ours, true) for ours, true in zip(found, exact, strict=True))


@pytest.mark.parametrize("name", ["even", "two without a token", "one that all take first"])
@pytest.mark.parametrize("kind", list(ACTIVATIONS))
def test_output_and_gradients_are_those_of_the_formula(kind: str, name: str) -> None:
    assert worst(mixture(kind, bias=kind == "clamped", fused=kind == "clamped"), routing(name)) < TOLERANCE


@pytest.mark.parametrize("fused", [True, False])
def test_weights_may_scale_the_input(fused: bool) -> None:
    settings = mixture(scales_input=True, fused=fused)
    assert worst(settings, routing("even")) < TOLERANCE
    assert worst(mixture(fused=fused), routing("even"), other=settings) > 0.1, "it matters which"


def test_an_expert_without_a_token_has_no_gradient() -> None:
    settings = mixture()
    for gradient in gradients(expert_mlp, settings, routing("two without a token"))[3:]:
        assert gradient[0].abs().max() > 0
        assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


def test_gradients_in_fp64() -> None:
    settings = mixture("clamped", bias=True, fused=True, dtype=torch.float64)
    x, weights = (normal(5, size, dtype=torch.float64).requires_grad_() for size in (HIDDEN, CHOSEN))
    index = routing("even")[:5]
    parameters = factors(settings, torch.float64)

    def compute(x: torch.Tensor, weights: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return expert_mlp(x, weights, index, settings, list(parameters))

    assert torch.autograd.gradcheck(compute, (x, weights, *parameters))


def test_a_row_in_the_wrong_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    index, settings = routing("even"), mixture()
    assert worst(settings, index) < TOLERANCE
    parts = [
        (products, "linear"),
        (products, "backward"),
        *((low_rank, name) for name in ("shrink", "expand", "outer")),
    ]
    for module, part in parts:
        with monkeypatch.context() as patch:
            patch.setattr(module, part, partial(_early, getattr(module, part)))
            assert worst(settings, index) > 100 * TOLERANCE, part


def _early(compute: Any, *arguments: Any) -> Any:
    """Calls `compute` with groups that end a row too early."""
    ends = [isinstance(value, torch.Tensor) and value.dtype is torch.int32 for value in arguments]
    return compute(
        *((value - 1).clamp(min=0) if is_ends else value for value, is_ends in zip(arguments, ends, strict=True))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(64, 2048, 768), (33, 256, 128)])
def test_grouped_products_on_a_gpu(sizes: tuple[int, int, int]) -> None:
    """Each error at most 1.1 times that of the loop over experts in bfloat16."""
    experts, hidden, wide = sizes
    ends = torch.tensor(sorted([0, 0, *(7 * n + n % 3 for n in range(experts - 2))]), device=DEVICE, dtype=torch.int32)
    rows, kind = int(ends[-1]), torch.bfloat16
    x, dy = normal(rows, hidden, dtype=kind), normal(rows, wide, seed=1, dtype=kind)
    w = normal(experts, wide, hidden, seed=2, dtype=kind)
    assert products.can_group(hidden, wide, x=x)
    for part, arguments in (("linear", (x, w)), ("backward", (dy, w))):
        compute = getattr(products, part)
        exact = compute(*(value.double() for value in arguments), ends)
        slow = compute(*(value.cpu() for value in arguments), ends.cpu()).to(DEVICE)
        errors = [float((value.double() - exact).norm() / exact.norm()) for value in (compute(*arguments, ends), slow)]
        assert errors[0] <= 1.1 * errors[1], (part, errors)
