"""NF4 to E4M3 by byte permutations: a table of the 16 bytes is made for each block of weights, and a word of eight
codes is looked up in it by four permutations, where `byte_products/nf4_bytes.py` loads, multiplies and rounds each
weight. 4.6 instructions a weight in the code for Hopper beside 10.6.

A comparison for cards from Ada on, which the trainer does not use: inline assembly does not run in the interpreter.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from finetune_kernels.primitives.nf4 import as_words, read_scales, scale_arguments

ROWS, BLOCKS = 16, 16
"""Rows of a tile, and blocks of 64 weights along them."""

PACK: tl.constexpr = tl.constexpr("""{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}""")
"""Four values as E4M3, the first in the lowest byte."""

# A selector has three bits of each code; the fourth, the sign of a byte of the word or of the word shifted, tells which
# half of the table holds it. The first weight of a byte is its upper code, so neighbours change places at the end.
LOOK_UP: tl.constexpr = tl.constexpr("""{
    .reg .b32 codes, later, shifted, low, high, upper;
    and.b32 codes, $2, 0x77777777;
    shr.u32 later, codes, 16;
    shl.b32 shifted, $2, 4;
    prmt.b32 low, $3, $4, codes;
    prmt.b32 high, $5, $6, codes;
    prmt.b32 upper, $2, shifted, 0x9D8C;
    lop3.b32 low, upper, high, low, 0xCA;
    prmt.b32 $0, low, low, 0x2301;
    prmt.b32 low, $3, $4, later;
    prmt.b32 high, $5, $6, later;
    prmt.b32 upper, $2, shifted, 0xBFAE;
    lop3.b32 low, upper, high, low, 0xCA;
    prmt.b32 $1, low, low, 0x2301;
}""")
"""Two words of four bytes each, from a word of eight codes and a table in four words."""


@triton.jit  # type: ignore[untyped-decorator]
def _quarter(code_ptr, factor, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four of the 16 values times the factor of each block, as E4M3 in a word."""
    a = tl.load(code_ptr + FIRST) * factor
    b = tl.load(code_ptr + FIRST + 1) * factor
    c = tl.load(code_ptr + FIRST + 2) * factor
    d = tl.load(code_ptr + FIRST + 3) * factor
    return tl.inline_asm_elementwise(PACK, "=r,f,f,f,f", [a, b, c, d], tl.int32, is_pure=True, pack=1)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    words_ptr, code_ptr, scale_ptr, code8_ptr, scale2_ptr, offset_ptr, inverse_ptr, out_ptr, rows, blocks,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, ROWS_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS_N + tl.arange(0, ROWS_N)
    column = tl.program_id(0) * BLOCKS_N + tl.arange(0, BLOCKS_N)
    inside = (row < rows)[:, None] & (column < blocks)[None, :]
    block = row[:, None] * blocks + column[None, :]

    scale = read_scales(block, inside, scale_ptr, code8_ptr, scale2_ptr, offset_ptr, BLOCK2, NESTED)
    factor = scale * tl.load(inverse_ptr + row, mask=row < rows, other=0.0)[:, None]
    t0, t1 = _quarter(code_ptr, factor, 0), _quarter(code_ptr, factor, 4)
    t2, t3 = _quarter(code_ptr, factor, 8), _quarter(code_ptr, factor, 12)

    WORDS: tl.constexpr = BLOCK // 8
    at = block.to(tl.int64)[:, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    word = tl.load(words_ptr + at, mask=inside[:, :, None], other=0)
    operands = [word, t0[:, :, None], t1[:, :, None], t2[:, :, None], t3[:, :, None]]
    first, second = tl.inline_asm_elementwise(
        LOOK_UP, "=&r,=&r,r,r,r,r,r", operands, (tl.int32, tl.int32), is_pure=True, pack=1
    )

    offsets = at[:, :, :, None] * 2 + tl.arange(0, 2)[None, None, None, :]
    tl.store(out_ptr + offsets, tl.join(first, second), mask=inside[:, :, None, None])


def decode(packed: torch.Tensor, state: Any, inverses: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes what `nf4_bytes.decode` writes as rows of E4M3 to `out` [out, in], contiguous."""
    tensors, constants = scale_arguments(state)
    rows, blocks = state.shape[0], state.shape[1] // state.blocksize
    _decode[(triton.cdiv(blocks, BLOCKS), triton.cdiv(rows, ROWS))](
        as_words(packed.view(1, -1)), state.code, *tensors, inverses, out.view(torch.int32), rows, blocks, **constants,
        ROWS_N=ROWS, BLOCKS_N=BLOCKS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
