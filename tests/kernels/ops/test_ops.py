"""Each kernel, forward and backward, against its formula in fp64, on odd shapes. Mistakes that these comparisons notice
are in test_mutants.py."""

from collections.abc import Callable

import pytest
import torch

from finetune_kernels.ops import gated_activation, linear_cross_entropy, lora_linear, rms_norm
from finetune_test_kernels.tensor_checks import DEVICE, normal, relative_error

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}  # measured 2e-6 and 8e-4 over these shapes
DTYPES = list(TOLERANCE)


def compare(
    ours: Callable[..., torch.Tensor], formula: Callable[..., torch.Tensor], inputs: list[torch.Tensor]
) -> list[float]:
    """Relative errors of the output and of each input's gradient; the formula is evaluated in fp64."""
    torch.manual_seed(5)
    leaves = [value.clone().requires_grad_(value.is_floating_point()) for value in inputs]
    exact = [value.double().requires_grad_(True) if value.is_floating_point() else value for value in inputs]

    found, expected = ours(*leaves), formula(*exact)
    upstream = torch.randn_like(expected)
    found.backward(upstream.to(found.dtype))
    expected.backward(upstream)

    errors = [relative_error(found.detach(), expected.detach())]
    for leaf, truth in zip(leaves, exact, strict=True):
        if leaf.grad is not None:
            assert truth.grad is not None
            errors.append(relative_error(leaf.grad, truth.grad))
    return errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 96), (2, 256), (5, 1000)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> None:
    weight = normal(shape[-1], seed=1)
    x = normal(*shape, dtype=dtype) * 3

    def formula(value: torch.Tensor) -> torch.Tensor:
        return value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight.double() + offset)

    def ours(value: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = rms_norm.RmsNormFunction.apply(value, rms_norm.Norm(weight, 1e-5, offset))
        return result

    errors = compare(ours, formula, [x])
    assert max(errors[:1]) < TOLERANCE[dtype]
    if shape[-1] > 1:  # over one element the gradient is zero but for eps
        assert max(errors) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 33), (2, 1024), (1, 1025)])
def test_gated_activation(shape: tuple[int, ...], dtype: torch.dtype, activation: gated_activation.Activation) -> None:
    def formula(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if activation == "silu":
            return torch.nn.functional.silu(gate) * up
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    def ours(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = gated_activation.GatedActivationFunction.apply(gate, up, activation)
        return result

    inputs = [normal(*shape, dtype=dtype) * 2, normal(*shape, dtype=dtype, seed=1)]
    assert max(compare(ours, formula, inputs)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 17), (5, 300), (7, 1024)])
def test_linear_cross_entropy(
    rows: int, vocabulary: int, softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ROWS", 3)  # several chunks, the last one shorter
    monkeypatch.setattr(linear_cross_entropy, "MAX_BLOCK", 256)  # several blocks of the vocabulary
    weight = normal(vocabulary, 32, dtype=dtype, seed=2) * 0.5
    targets = torch.arange(rows, device=DEVICE) * 7 % vocabulary

    def formula(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight.double().T
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    def ours(hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = linear_cross_entropy.LinearCrossEntropyFunction.apply(hidden, weight, targets, softcap)
        return result

    assert max(compare(ours, formula, [normal(rows, 32, dtype=dtype)])) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_of_a_head_that_train_take_the_place_of_its_own(
    softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ROWS", 3)
    weight = normal(300, 32, dtype=dtype, seed=2) * 0.5
    targets = torch.tensor([0, 290, 291, 17, 290, 299, 292], device=DEVICE)  # 290 to 292 train

    def formula(hidden: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        whole = torch.cat((weight[:290].double(), new, weight[293:].double()))
        logits = hidden @ whole.T
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    def ours(hidden: torch.Tensor, new: torch.Tensor, first: int = 290) -> torch.Tensor:
        result: torch.Tensor = linear_cross_entropy.LinearCrossEntropyFunction.apply(
            hidden, weight, targets, softcap, new, first
        )
        return result

    inputs = [normal(7, 32, dtype=dtype), normal(3, 32, dtype=dtype, seed=3) * 0.5]
    assert max(compare(ours, formula, inputs)) < TOLERANCE[dtype]
    assert max(compare(lambda hidden, new: ours(hidden, new, 289), formula, inputs)) > 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "rank"), [((1, 16), 4), ((2, 5, 16), 1), ((13, 16), 7), ((13, 16), 64), ((1, 16), 128)]
)
def test_lora_linear(shape: tuple[int, ...], rank: int, with_bias: bool) -> None:
    w, bias = normal(24, 16, seed=3), normal(24, seed=4) if with_bias else None
    inputs = [normal(*shape), normal(rank, 16, seed=5), normal(24, rank, seed=6)]

    def ours(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_linear.lora_linear(x, lambda: w, a, b, 0.5, bias)

    def formula(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_linear.reference(x, w.double(), a, b, 0.5, None if bias is None else bias.double())

    assert max(compare(ours, formula, inputs)) < TOLERANCE[torch.float32]
