"""K-quants: read back by the `gguf` package, and as close to the weights as llama.cpp's own.

The reference errors are those of `ggml_quantize_chunk` (ggml 0.5.0, no importance matrix) on the same weights.
"""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType

from finetune_trainer.gguf.quantizers import encoded_size, quantize

FORMS = [GGMLQuantizationType[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]


def made() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(128, 1024, generator=generator) * 0.02
    heavy = torch.randn(128, 1024, generator=generator) / torch.rand(128, 1024, generator=generator).clamp(0.1) * 0.02
    return {"normal": normal, "heavy": heavy, "positive": torch.rand(128, 1024, generator=generator)}


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
    return float(((weight * (decoded(encoded, x.shape, form) - x).square()).sum() / weight.sum()).sqrt())


REFERENCE = [
    ("Q2_K", "normal", 5.4764e-03),
    ("Q2_K", "heavy", 2.8960e-02),
    ("Q2_K", "positive", 7.5649e-02),
    ("Q3_K", "normal", 2.8288e-03),
    ("Q3_K", "heavy", 1.5191e-02),
    ("Q3_K", "positive", 5.7314e-02),
    ("Q4_K", "normal", 1.4221e-03),
    ("Q4_K", "heavy", 8.6417e-03),
    ("Q4_K", "positive", 1.6676e-02),
    ("Q5_K", "normal", 7.2289e-04),
    ("Q5_K", "heavy", 4.4191e-03),
    ("Q5_K", "positive", 8.3084e-03),
    ("Q6_K", "normal", 3.0646e-04),
    ("Q6_K", "heavy", 1.6838e-03),
    ("Q6_K", "positive", 6.8575e-03),
]


@pytest.mark.parametrize(("form", "weights", "reference"), REFERENCE)
def test_is_no_further_from_the_weights_than_llama_cpp(form: str, weights: str, reference: float) -> None:
    x, kind = made()[weights], GGMLQuantizationType[form]
    encoded = quantize(x, kind)
    assert encoded.numel() == encoded_size(tuple(x.shape), kind)
    assert weighted_error(encoded, x, kind) <= reference
    wrong = encoded.clone()
    wrong.view(-1, gguf.GGML_QUANT_SIZES[kind][1])[:, 20:36] ^= 0x55  # codes, in every type
    assert weighted_error(wrong, x, kind) > reference


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
    x = made()["heavy"]
    assert torch.equal(quantize(x, form)[: encoded_size((1, 1024), form)], quantize(x[:1], form))
