"""Cases of NF4 decoding, to 16 bits and to bytes, and of products with weights that are decoded in each pass.

`nf4 decoding` is one weight, up or gate; bytes come as rows for x W^T or as columns for dy W. A `byte_product` is what
a pass does for a group of linears that keeps nothing: quantise x or dy, decode NF4, multiply. Beside it stands the same
in 16 bits: NF4 decoded to them, and multiplied. `product alone` has all operands at hand, beside the 16-bit product.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks import gathered_nf4, permuted_nf4
from benchmarks.micro_case import Case, Sizes
from benchmarks.micro_linears import groups_of
from finetune_kernels.primitives.byte_products import fp8, int8
from finetune_kernels.primitives.byte_products.byte_rows import quantize_rows
from finetune_kernels.primitives.byte_products.nf4_bytes import decode, row_scales
from finetune_kernels.primitives.nf4 import dequantize

PRODUCTS = {torch.float8_e4m3fn: fp8.product, torch.int8: int8.product}
NAMES = {torch.float8_e4m3fn: "E4M3", torch.int8: "int8"}


class _Weight(NamedTuple):
    """A weight in NF4, and its shape."""

    packed: torch.Tensor
    state: Any
    out: int
    features: int


def decoding_cases(sizes: Sizes) -> Iterator[Case]:
    """Yields cases of NF4, double-quantised, to 16 bits and to bytes."""
    from bitsandbytes.functional import dequantize_4bit

    weight = _quantized(sizes, sizes.feed_forward, sizes.hidden)
    packed, state, out, features = weight
    count, shape = out * features, f"{out} x {features}"
    read = count * 0.5 + count / 64 + 4 * count / 64 / 256

    wide = torch.empty(out, features, dtype=sizes.dtype, device=sizes.device)
    yield Case(
        "nf4 decoding", "forward", shape, read + count * sizes.element, "TB/s",
        lambda: dequantize(packed, state, wide), rival=lambda: dequantize_4bit(packed, state),
        rival_name="bitsandbytes",
    )  # fmt: skip
    yield Case(
        "nf4 decoding, gathered values", "forward", shape, read + count * sizes.element, "TB/s",
        lambda: gathered_nf4.dequantize(packed, state, wide),
    )  # fmt: skip

    for dtype in _types(sizes):
        inverses, name = 1 / row_scales(state, dtype), f"nf4 decoding, {NAMES[dtype]}"
        rows = torch.empty(out, features, dtype=dtype, device=sizes.device)
        columns = torch.empty(features, out, dtype=dtype, device=sizes.device)
        for order, way, into in (("rows", "forward", rows), ("columns", "backward", columns)):
            run = partial(decode, packed, state, inverses, into, transposed=into is columns)
            yield Case(f"{name} {order}", way, shape, read + count, "TB/s", run)

        if sizes.device == "cuda" and dtype is torch.float8_e4m3fn:
            run = partial(permuted_nf4.decode, packed, state, inverses, rows)
            yield Case(f"{name} rows, permuted", "forward", shape, read + count, "TB/s", run)


def byte_cases(sizes: Sizes) -> Iterator[Case]:
    """Yields cases of products of each group of linears, whose weights are decoded to bytes."""
    for name, (features, outputs) in groups_of(sizes).items():
        weight = _quantized(sizes, sum(outputs), features)
        x, dy = sizes.random(sizes.tokens, features), sizes.random(sizes.tokens, sum(outputs))
        for dtype in _types(sizes):
            yield from _product_cases(f"byte_product {name}, {NAMES[dtype]}", dtype, weight, x, dy)


def _product_cases(
    name: str, dtype: torch.dtype, weight: _Weight, x: torch.Tensor, dy: torch.Tensor
) -> Iterator[Case]:  # fmt: skip
    packed, state, out, features = weight
    product, scales = PRODUCTS[dtype], row_scales(state, dtype)
    inverses, factors, ones = 1 / scales, scales.squeeze(1), torch.ones(features, 1, device=x.device)
    shape, work = f"{len(x)} x {features} -> {out}", 2.0 * len(x) * features * out

    def wide() -> torch.Tensor:
        return dequantize(packed, state, x.new_empty(out, features))

    def rows() -> torch.Tensor:
        return decode(packed, state, inverses, x.new_empty(out, features, dtype=dtype), transposed=False)

    def columns() -> torch.Tensor:
        return decode(packed, state, inverses, x.new_empty(features, out, dtype=dtype), transposed=True)

    yield Case(
        name, "forward", shape, work, "TFLOP/s",
        lambda: product(*quantize_rows(x, dtype), rows(), scales, None, x.dtype), lambda: x @ wide().T,
    )  # fmt: skip
    yield Case(
        name, "backward", shape, work, "TFLOP/s",
        lambda: product(*quantize_rows(dy, dtype, factors), columns(), ones, None, x.dtype), lambda: dy @ wide(),
    )  # fmt: skip

    values, x_scales = quantize_rows(x, dtype)
    held, weights = rows(), wide()
    yield Case(
        f"{name}, product alone", "forward", shape, work, "TFLOP/s",
        lambda: product(values, x_scales, held, scales, None, x.dtype), lambda: x @ weights.T,
    )  # fmt: skip


def _types(sizes: Sizes) -> list[torch.dtype]:
    """The types of bytes that the device multiplies."""
    has_fp8 = sizes.device == "cpu" or torch.cuda.get_device_capability() >= fp8.MIN_CAPABILITY
    return [dtype for dtype in NAMES if has_fp8 or dtype is torch.int8]


def _quantized(sizes: Sizes, out: int, features: int) -> _Weight:
    """Returns a random weight in double-quantised NF4."""
    from bitsandbytes.functional import quantize_4bit

    wide = sizes.random(out, features, scale=0.02)
    return _Weight(*quantize_4bit(wide, compress_statistics=True, quant_type="nf4"), out, features)
