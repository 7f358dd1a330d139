"""The benchmark's permuted bytes are those of the trainer's kernel, on a GPU with FP8."""

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from benchmarks import permuted_nf4
from finetune_kernels.primitives.byte_products.fp8 import MIN_CAPABILITY
from finetune_kernels.primitives.byte_products.nf4_bytes import reference, row_scales
from finetune_test_kernels.tensor_checks import normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < MIN_CAPABILITY,
        reason="needs a GPU with FP8",
    ),
]


@pytest.mark.parametrize("shape", [(33, 192), (130, 1088), (4096, 14_336)])
def test_permuted_bytes_are_the_formula(shape: tuple[int, int]) -> None:
    packed, state = quantize_4bit(normal(*shape), quant_type="nf4", compress_statistics=True)
    inverses = 1 / row_scales(state, torch.float8_e4m3fn)
    found = torch.zeros(shape, dtype=torch.float8_e4m3fn, device="cuda")
    expected = reference(packed, state, inverses, torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(permuted_nf4.decode(packed, state, inverses, found).view(torch.uint8), expected)
    packed.view(-1)[7] ^= 0x77
    assert not torch.equal(permuted_nf4.decode(packed, state, inverses, found).view(torch.uint8), expected)
