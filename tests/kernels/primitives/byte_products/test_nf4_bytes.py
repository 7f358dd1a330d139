"""NF4 weights as bytes: kernels equal their formula to the bit in both orders, and bytes cost what rounding costs."""

from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from finetune_kernels.primitives import nf4
from finetune_kernels.primitives.byte_products import fp8, int8
from finetune_kernels.primitives.byte_products.byte_rows import quantize_by_kernel, quantize_rows
from finetune_kernels.primitives.byte_products.byte_rows import reference as rows_reference
from finetune_kernels.primitives.byte_products.nf4_bytes import decode, fits_bytes, reference, row_scales
from finetune_test_kernels.tensor_checks import DEVICE, normal, root_error

TYPES = (torch.float8_e4m3fn, torch.int8)
SHAPES = [(16, 64), (33, 192), (130, 640), (7, 1088)]
"""Rows that end within a tile, and columns: tiles are 8 x 512 and 128 x 64."""


def packed_weight(shape: tuple[int, int], *, nested: bool = True, blocksize: int = 64) -> tuple[torch.Tensor, Any]:
    weights = normal(*shape, seed=shape[1]) * torch.linspace(0.01, 1, shape[0], device=DEVICE)[:, None]
    return quantize_4bit(weights, quant_type="nf4", compress_statistics=nested, blocksize=blocksize)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def check(shape: tuple[int, int], dtype: torch.dtype, *, nested: bool, blocksize: int) -> None:
    packed, state = packed_weight(shape, nested=nested, blocksize=blocksize)
    inverses = 1 / row_scales(state, dtype)
    expected = reference(packed, state, inverses, dtype)
    rows, columns = (torch.zeros(size, dtype=dtype, device=DEVICE) for size in (shape, shape[::-1]))
    assert torch.equal(bits(decode(packed, state, inverses, rows, transposed=False)), bits(expected))
    assert torch.equal(bits(decode(packed, state, inverses, columns, transposed=True)), bits(expected).T)

    flat = packed.flatten()
    flat[flat.numel() // 2] ^= 0x77
    assert (bits(decode(packed, state, inverses, rows, transposed=False)) != bits(expected)).sum() in (1, 2)
    assert (bits(decode(packed, state, inverses, columns, transposed=True)) != bits(expected).T).sum() in (1, 2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_orders_are_the_formula_to_the_bit(shape: tuple[int, int], nested: bool, dtype: torch.dtype) -> None:
    check(shape, dtype, nested=nested, blocksize=64)


@pytest.mark.parametrize("dtype", TYPES)
def test_larger_blocks(dtype: torch.dtype) -> None:
    check((33, 384), dtype, nested=True, blocksize=128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (14_336, 4096), (4096, 14_336), (1023, 4160)])
def test_bits_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if dtype is torch.float8_e4m3fn and torch.cuda.get_device_capability() < fp8.MIN_CAPABILITY:
        pytest.skip("needs a GPU with FP8")
    check(shape, dtype, nested=True, blocksize=64)


def test_layers_side_by_side_are_written_into_one_matrix() -> None:
    shapes = ((32, 128), (16, 128))
    columns = torch.zeros(128, 48, dtype=torch.int8, device=DEVICE)
    expected = []
    for shape, part in zip(shapes, columns.split((32, 16), dim=1), strict=True):
        packed, state = packed_weight(shape)
        inverses = 1 / row_scales(state, torch.int8)
        decode(packed, state, inverses, part, transposed=True)
        expected.append(reference(packed, state, inverses, torch.int8).T)
    assert torch.equal(columns, torch.cat(expected, dim=1))


@pytest.mark.parametrize("dtype", TYPES)
def test_the_blocks_scales_tell_a_rows_largest_weight(dtype: torch.dtype) -> None:
    packed, state = packed_weight((40, 256))
    weights, scales = nf4.reference(packed, state), row_scales(state, dtype)
    limit = 127 if dtype is torch.int8 else 448
    assert torch.equal(weights.float().abs().amax(1, keepdim=True) * (1 / limit), scales)
    values = reference(packed, state, 1 / scales, dtype).float()
    assert values.abs().amax(1).eq(limit).all(), "the whole range is used"


def test_rows_of_zeros_stay_zeros() -> None:
    packed, state = quantize_4bit(torch.zeros(16, 64, device=DEVICE), quant_type="nf4")
    for dtype in TYPES:
        inverses = 1 / row_scales(state, dtype)
        found = decode(packed, state, inverses, torch.ones(16, 64, dtype=dtype, device=DEVICE), transposed=False)
        assert not found.float().any()


def test_blocks_that_cross_rows_are_told() -> None:
    assert fits_bytes(packed_weight((16, 128))[1])
    assert not fits_bytes(packed_weight((16, 96))[1])
    assert not fits_bytes(quantize_4bit(normal(16, 64), quant_type="fp4")[1])


COSTS = {torch.float8_e4m3fn: (0.0263, 0.0374), torch.int8: (0.0080, 0.0115)}
"""Measured errors, relative: of weights against NF4's (1,024 x 2,048, normal numbers), of products to exact ones."""
SPREAD = 0.2
"""How far sizes and seeds move them."""


@pytest.mark.parametrize("dtype", TYPES)
def test_bytes_cost_what_rounding_costs_in_both_products(dtype: torch.dtype) -> None:
    packed, state = packed_weight((384, 1024))
    weights, scales = nf4.reference(packed, state).double(), row_scales(state, dtype)
    values = reference(packed, state, 1 / scales, dtype)
    of_weights, of_products = COSTS[dtype]
    assert root_error(values.double() * scales, weights) == pytest.approx(of_weights, rel=SPREAD)

    product = int8.product if dtype is torch.int8 else fp8.product
    x, dy, bias = normal(50, 1024, seed=1), normal(50, 384, seed=2), normal(384, seed=3)
    y = product(*quantize_rows(x, dtype), values, scales, bias, torch.float32)
    assert root_error(y - bias, x @ weights.float().T) == pytest.approx(of_products, rel=SPREAD)

    ones = torch.ones(1024, 1, device=DEVICE)
    dx = product(*quantize_rows(dy, dtype, scales.squeeze(1)), values.T.contiguous(), ones, None, torch.float32)
    assert root_error(dx, dy @ weights.float()) == pytest.approx(of_products, rel=SPREAD)
    wrong = product(*quantize_rows(dy, dtype), values.T.contiguous(), ones, None, torch.float32)
    assert root_error(wrong, dy @ weights.float()) > 0.5, "the control: without the rows' scales in dy"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("has_factors", [True, False])
def test_rows_of_inputs_are_the_formula(has_factors: bool, dtype: torch.dtype) -> None:
    x = (normal(9, 200) * torch.logspace(-20, 20, 9, device=DEVICE)[:, None])[:, :96]
    x[3] = 0
    factors = normal(96, seed=4).abs() if has_factors else None
    values, scales = quantize_by_kernel(x, dtype, factors)
    expected, same = rows_reference(x, dtype, factors)
    assert torch.equal(bits(values), bits(expected))
    assert torch.equal(scales, same)
    assert not torch.equal(bits(values), bits(rows_reference(x.flip(1), dtype, factors)[0]))


@pytest.mark.parametrize("has_bias", [True, False])
def test_whole_numbers_are_scaled_by_the_formula(has_bias: bool) -> None:
    whole = torch.randint(-(2**24), 2**24, (5, 1100), dtype=torch.int32, device=DEVICE)
    scales, others = normal(5, 1).abs(), normal(1100, 1, seed=1).abs()
    bias = normal(1100, seed=2) if has_bias else None
    expected = int8.reference(whole, scales, others, bias, torch.float32)
    assert torch.equal(int8.rescale(whole, scales, others, bias, torch.float32), expected)
    assert not torch.equal(int8.rescale(whole, scales, others.flip(0), bias, torch.float32), expected)


def test_fewer_rows_than_the_product_takes() -> None:
    x, w = (torch.randint(-127, 128, size, dtype=torch.int8, device=DEVICE) for size in ((3, 64), (16, 64)))
    ones = torch.ones(16, 1, device=DEVICE)
    found = int8.product(x, ones[:3], w, ones, None, torch.float32)
    assert torch.equal(found, (x.int().cpu() @ w.int().cpu().T).float().to(DEVICE))


def test_the_interpreters_rounding_is_to_the_nearest_byte() -> None:
    """Against all E4M3 numbers in fp64: the nearest, of two the even one. 448 makes the row's scale 1."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 to 448
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat((numbers, between, between * (1 - 2**-20), between * (1 + 2**-20))).float()
    distance = (x.double()[:, None] - numbers[None, :]).abs()
    ties = distance == distance.amin(1, keepdim=True)
    even = torch.arange(127) % 2 == 0
    nearest = torch.where(ties.sum(1) == 1, ties.int().argmax(1), (ties & even).int().argmax(1))

    values, scales = quantize_by_kernel(x.to(DEVICE)[None, :], torch.float8_e4m3fn, None)
    assert scales.item() == 1
    assert torch.equal(bits(values)[0].long().cpu(), nearest)
