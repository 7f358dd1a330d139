"""Decoded weights are those that the gguf package decodes, for every type that is written."""

import numpy as np
import pytest
import torch
from gguf import dequantize as judge

from finetune_trainer.export.quantization import dequantize as decoding
from finetune_trainer.export.quantization.dequantize import dequantize
from finetune_trainer.export.quantization.quantize import encoded_size, quantize
from finetune_trainer.export.quantization.quantizers import QUANTIZERS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", QUANTIZERS, ids=lambda kind: kind.name)
def test_every_bit_of_a_block_is_decoded_as_the_gguf_package_does(
    kind: object, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "CHUNK_WEIGHTS", 512)  # several chunks, the last of them smaller
    generator = torch.Generator().manual_seed(1)
    count = encoded_size((9, 256), kind)
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    if kind.name in ("F32", "F16", "BF16"):  # random bytes hold NaN
        data = quantize(torch.randn(9, 256, generator=generator), kind)

    with np.errstate(invalid="ignore"):
        expected = judge(data.numpy().reshape(9, -1), kind)
    usable = np.isfinite(expected).reshape(-1)
    assert usable.mean() > 0.5, "random scales of float16 are NaN in one case of 32"
    found = dequantize(data.to(device), kind, torch.float32).cpu().numpy()
    np.testing.assert_array_equal(found[usable], expected.reshape(-1)[usable])


@pytest.mark.parametrize("kind", QUANTIZERS, ids=lambda kind: kind.name)
def test_weights_come_back_within_a_step_of_their_type(kind: object) -> None:
    weights = torch.randn(8, 256, generator=torch.Generator().manual_seed(2))
    found = dequantize(quantize(weights, kind), kind, torch.float32).view(8, 256)
    assert (found - weights).norm() / weights.norm() < {"Q2_K": 0.35, "Q3_K": 0.2, "MXFP4": 0.13}.get(kind.name, 0.11)
