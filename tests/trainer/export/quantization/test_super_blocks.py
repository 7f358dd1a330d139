"""K-quants: read back by the `gguf` package, and no further from the weights than llama.cpp's own, which encodes the
same weights beside ours."""

from collections.abc import Callable

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType

from finetune_test_programs.reference_quantizer import quantize_rows
from finetune_trainer.export.quantization.quantize import encoded_size, quantize

FORMS = [GGMLQuantizationType[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]
ROWS, COLUMNS = 128, 1024


def normal(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=generator) * 0.02


def uniform(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(ROWS, COLUMNS, generator=generator)


WEIGHTS: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "normal": normal,
    "16-bit": lambda generator: normal(generator).bfloat16().float(),
    "heavy tails": lambda generator: normal(generator) / uniform(generator).clamp(0.01),
    "few outliers": lambda generator: normal(generator) + (uniform(generator) < 0.002).float(),
    "uniform": lambda generator: uniform(generator) - 0.5,
    "positive": uniform,
    "rows of many sizes": lambda generator: normal(generator) * torch.rand(ROWS, 1, generator=generator),
}


def make(name: str) -> torch.Tensor:
    return WEIGHTS[name](torch.Generator().manual_seed(0))


def decoded(encoded: torch.Tensor, shape: torch.Size, form: GGMLQuantizationType) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(encoded.numpy(), form)).view(shape)


def weighted_error(encoded: torch.Tensor, x: torch.Tensor, form: GGMLQuantizationType) -> float:
    """Root mean square, weighted as llama.cpp weights errors without an importance matrix."""
    if form in (GGMLQuantizationType.Q3_K, GGMLQuantizationType.Q6_K):
        weight = x.square()
    elif form is GGMLQuantizationType.Q2_K:
        weight = x.abs()
    else:
        groups = x.view(-1, 32)
        weight = (groups.abs() + groups.square().mean(1, keepdim=True).sqrt()).view_as(x)
    squares = weight.double() * (decoded(encoded, x.shape, form) - x).double().square()
    return float((squares.sum() / weight.double().sum()).sqrt())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("form", FORMS)
def test_is_no_further_from_the_weights_than_llama_cpp(form: GGMLQuantizationType, weights: str) -> None:
    """Measured: Q2_K 0.73-0.98 of llama.cpp's error, Q3_K 0.85-0.95, Q4_K 0.986-0.997, Q5_K 0.97-0.99, Q6_K
    0.89-0.999."""
    x = make(weights)
    reference = weighted_error(torch.from_numpy(quantize_rows(x.numpy(), form)), x, form)
    encoded = quantize(x, form)
    assert encoded.numel() == encoded_size(tuple(x.shape), form)
    assert weighted_error(encoded, x, form) <= reference
    wrong = encoded.clone()
    wrong.view(-1, gguf.GGML_QUANT_SIZES[form][1])[:, 20:36] ^= 0x55  # codes, in every type
    assert weighted_error(wrong, x, form) > reference


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros(form: GGMLQuantizationType) -> None:
    x = torch.zeros(2, 512)
    x[1, :256] = torch.linspace(-1, 1, 256)
    back = decoded(quantize(x, form), x.shape, form)
    assert not back[0].any()
    assert not back[1, 256:].any()
    assert back[1, :256].any()


@pytest.mark.parametrize("form", FORMS)
def test_blocks_do_not_depend_on_each_other(form: GGMLQuantizationType) -> None:
    x = make("heavy tails")
    assert torch.equal(quantize(x, form)[: encoded_size((1, COLUMNS), form)], quantize(x[:1], form))
