"""NF4 to 16 bits by `tl.gather` from a table in shared memory, where `primitives/nf4.py` loads the 16 values.

7.7 instructions a weight in the code for Hopper beside 10.4, without what odd sizes and stacks need. A comparison: the
trainer does not use it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from finetune_kernels.primitives.nf4 import WORDS, as_words, read_scales, scale_arguments


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    words_ptr, code_ptr, scale_ptr, code8_ptr, scale2_ptr, offset_ptr, out_ptr, words,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, WORDS_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * WORDS_N
    rows = first + tl.arange(0, WORDS_N)
    inside = rows < words
    word = tl.load(words_ptr + rows, mask=inside, other=0)
    scale = read_scales(
        rows // (BLOCK // 8), inside, scale_ptr, code8_ptr, scale2_ptr, offset_ptr, BLOCK2, NESTED
    )  # fmt: skip

    place = tl.arange(0, 8)
    number = (word[:, None] >> (4 * (place ^ 1))[None, :]) & 15
    values = tl.load(code_ptr + tl.arange(0, 16))
    value = tl.gather(values, number.reshape(WORDS_N * 8), 0).reshape(WORDS_N, 8) * scale[:, None]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * 8 + place[None, :], value, mask=inside[:, None])


def dequantize(packed: torch.Tensor, state: Any, out: torch.Tensor) -> torch.Tensor:
    """Writes what `nf4.dequantize` writes, for a whole number of words."""
    words = as_words(packed.view(1, -1))
    tensors, constants = scale_arguments(state)
    _decode[(triton.cdiv(words.shape[1], WORDS),)](
        words, state.code, *tensors, out, words.shape[1], **constants, WORDS_N=WORDS, enable_fp_fusion=False
    )
    return out
