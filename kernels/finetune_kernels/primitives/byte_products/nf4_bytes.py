"""NF4 weights decoded to one byte each, E4M3 or int8, in one pass: W ~ values * scales, a scale for each row.

    s[n] = max |W[n]| / limit,   q[n, k] = code[...] * (block scale / s[n]), rounded once;   limit: 448 or 127

Shapes: packed weights of [out, in] -> q [out, in], or transposed [in, out]; s fp32 [out].

The largest weight of each block has the code -1 or 1, so a row's maximum is the largest of its blocks' scales: known
without reading a code. q comes in either order, as tensor cores read bytes along the summed side only: x W^T sums along
a row, dy W along a column. Both have the same values, so backward is the gradient of what forward computed; its scales
are along the summed side there, and belong to dy.

Eight weights are a word, as in `nf4`; a block of weights must not cross rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from finetune_kernels.primitives.byte_products.byte_rows import limit_of, smallest_row, to_byte
from finetune_kernels.primitives.nf4 import as_words, block_scales, read_scales, scale_arguments

ROWS, WORDS = 8, 64
"""Rows of a tile and words of eight weights along them, where rows are stored."""
COLUMN_ROWS, COLUMN_WORDS = 128, 8
"""The same where columns are stored."""


def fits_bytes(state: Any) -> bool:
    """True if weights of this quant state can be decoded to bytes: NF4, with whole blocks in each row."""
    return bool(state.quant_type == "nf4" and state.shape[1] % state.blocksize == 0)


def row_scales(state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Returns the scale of each row, fp32 [out, 1], for values of `dtype`."""
    largest: torch.Tensor = block_scales(state).view(state.shape[0], -1).abs().amax(dim=1, keepdim=True)
    return largest.clamp_min(smallest_row(dtype)) * (1 / limit_of(dtype))


def reference(packed: torch.Tensor, state: Any, inverses: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the values [out, in] in `dtype` by the formula, in PyTorch; `inverses`: one over each row's scale."""
    blocks, flat = block_scales(state).view(state.shape[0], -1), packed.flatten().int()
    values = state.code[torch.stack((flat >> 4, flat & 15), dim=1)].view(*blocks.shape, state.blocksize)
    scaled: torch.Tensor = (values * (blocks * inverses)[:, :, None]).view(state.shape)
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype)


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    words_ptr, code_ptr, scale_ptr, code8_ptr, scale2_ptr, offset_ptr, inverse_ptr, out_ptr, rows, words, stride,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS_N: tl.constexpr, WORDS_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS_N + tl.arange(0, ROWS_N)
    column = tl.program_id(0) * WORDS_N + tl.arange(0, WORDS_N)  # in words
    inside = (row < rows)[:, None] & (column < words)[None, :]
    word = tl.load(words_ptr + row.to(tl.int64)[:, None] * words + column[None, :], mask=inside, other=0)

    block = row[:, None] * (words // (BLOCK // 8)) + (column // (BLOCK // 8))[None, :]
    scale = read_scales(block, inside, scale_ptr, code8_ptr, scale2_ptr, offset_ptr, BLOCK2, NESTED)
    factor = scale * tl.load(inverse_ptr + row, mask=row < rows, other=0.0)[:, None]

    # Bytes follow one another in a word, the first weight of each in its upper half.
    place = tl.arange(0, 8)
    number = (word[:, :, None] >> (4 * (place ^ 1))[None, None, :]) & 15
    value = tl.load(code_ptr + number) * factor[:, :, None]

    at = column[:, None] * 8 + place[None, :]
    if TRANSPOSED:
        offsets = at.to(tl.int64)[None, :, :] * stride + row[:, None, None]
    else:
        offsets = row.to(tl.int64)[:, None, None] * stride + at[None, :, :]
    tl.store(out_ptr + offsets, to_byte(value, out_ptr), mask=inside[:, :, None])


def decode(
    packed: torch.Tensor, state: Any, inverses: torch.Tensor, out: torch.Tensor, *, transposed: bool
) -> torch.Tensor:
    """Writes the values to `out`, E4M3 or int8, [out, in] or transposed [in, out], and returns it; its rows may be
    strided. `inverses`: one over each row's scale."""
    words = as_words(packed.view(1, -1)).view(state.shape[0], -1)
    tensors, constants = scale_arguments(state)
    tile_rows, tile_words = (COLUMN_ROWS, COLUMN_WORDS) if transposed else (ROWS, WORDS)
    grid = triton.cdiv(words.shape[1], tile_words), triton.cdiv(words.shape[0], tile_rows)
    _decode[grid](
        words, state.code, *tensors, inverses, out, *words.shape, out.stride(0), **constants, TRANSPOSED=transposed,
        ROWS_N=tile_rows, WORDS_N=tile_words, enable_fp_fusion=False,
    )  # fmt: skip
    return out
