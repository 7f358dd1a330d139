"""A stack of NF4 matrices holds, byte for byte, what bitsandbytes makes of each alone, and decodes to its bits."""

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from finetune_kernels.primitives import nf4
from finetune_kernels.primitives.nf4_stack import Nf4Stack
from finetune_test_kernels.tensor_checks import DEVICE, normal

SHAPES = [(3, 64, 64), (2, 33, 70), (4, 256, 128), (2, 5, 3), (2, 256, 129)]


def stacked(shape: tuple[int, int, int], dtype: torch.dtype, *, double: bool) -> tuple[torch.Tensor, Nf4Stack]:
    # Matrices of different size, so that each has scales and an offset of its own.
    sizes = torch.tensor([0.01 * 3**n for n in range(shape[0])], device=DEVICE)
    weights = (normal(*shape) * sizes[:, None, None]).to(dtype)
    return weights, Nf4Stack.of(weights, double=double)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_matrix_is_quantised_as_if_it_were_alone(shape: tuple[int, int, int], double: bool) -> None:
    weights, stack = stacked(shape, torch.float32, double=double)
    for number, matrix in enumerate(weights):
        packed, state = quantize_4bit(matrix, quant_type="nf4", compress_statistics=double)
        assert torch.equal(stack.codes[number], packed.flatten())
        assert torch.equal(stack.scales[number], state.absmax)
        if double:
            assert stack.scales2 is not None
            assert stack.offsets is not None
            assert torch.equal(stack.scales2[number], state.state2.absmax)
            assert torch.equal(stack.offsets[number], state.offset)
    assert stack.bytes == sum(tensor.nbytes for tensor in stack.tensors().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_are_decoded_to_the_bits_of_each(shape: tuple[int, int, int], double: bool, dtype: torch.dtype) -> None:
    weights, stack = stacked(shape, dtype, double=double)
    alone = [quantize_4bit(matrix, quant_type="nf4", compress_statistics=double) for matrix in weights]
    expected = torch.stack([nf4.reference(packed, state) for packed, state in alone])
    assert torch.equal(stack.reference(dtype), expected)
    out = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    assert torch.equal(nf4.dequantize_stack(stack, out), expected)
    assert torch.equal(stack.dequantize(dtype), expected)


def test_scales_of_another_matrix_are_noticed() -> None:
    weights, stack = stacked((3, 64, 64), torch.float32, double=True)
    right = nf4.dequantize_stack(stack, torch.empty_like(weights))
    for name in ("codes", "scales", "scales2", "offsets"):
        value = getattr(stack, name)
        setattr(stack, name, value.roll(1, 0))
        assert not torch.equal(nf4.dequantize_stack(stack, torch.empty_like(weights)), right), name
        setattr(stack, name, value)
