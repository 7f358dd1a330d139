"""Decoded NF4 weights equal bitsandbytes' to the bit."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from finetune_kernels.nf4 import dequantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On the CPU Triton's interpreter runs the kernel, which truncates to bfloat16.
TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (33, 70), (1, 1), (129, 4099), (7, 128)])
def test_bits_are_those_of_bitsandbytes(shape: tuple[int, int], nested: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(shape[1])
    weights = (torch.randn(shape, device=DEVICE) * 0.02).to(dtype)
    packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=nested)
    expected = dequantize_4bit(packed, state)
    found = dequantize(packed, state, torch.full(shape, float("nan"), dtype=dtype, device=DEVICE))
    assert torch.equal(found, expected)
    flat = packed.flatten()
    flat[flat.numel() // 2] ^= 0x11
    assert not torch.equal(dequantize(packed, state, found), expected)


def test_other_types_are_refused() -> None:
    packed, state = quantize_4bit(torch.randn(64, 64, device=DEVICE), quant_type="fp4")
    with pytest.raises(ValueError, match="cannot decode fp4"):
        dequantize(packed, state, torch.empty(64, 64, device=DEVICE))
