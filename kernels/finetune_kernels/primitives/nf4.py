"""NF4 weights dequantised in one pass, equal to bitsandbytes' result to the bit.

    w[i] = code[q[i]] * absmax[i / 64],   absmax[b] = code8[a[b]] * absmax2[b / 256] + offset

Shapes: packed bytes, two weights each, and the quant state that bitsandbytes keeps -> [out, in] in any float type.
A stack of matrices (experts) is decoded in one launch: each has its own scales and offset, as if it were alone.

bitsandbytes computes the scales in a pass of their own, in fp32, and keeps them while it decodes; here both levels are
read where they are used. The scale is rounded after the product and after the sum, as there: contraction to one
multiply-add is switched off.

A thread takes four words of eight weights, which have one scale: 11 instructions a weight on Hopper, where single
bytes, each with a scale of its own, took 22.

Source: Dettmers et al., "QLoRA", 2023, section 3 (NF4 and double quantisation).
"""

from typing import Any

import torch
import triton
import triton.language as tl

WORDS = 512
"""Words of eight packed weights per program."""
BLOCK, BLOCK2 = 64, 256
"""Weights that share a scale in a stack, and scales that share a scale of their own: bitsandbytes' defaults."""


def reference(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Returns the formula's weights in fp32, rounded to the state's type, in the state's shape [out, in]."""
    flat, count = packed.flatten().int(), state.shape.numel()
    values = state.code[torch.stack((flat >> 4, flat & 15), dim=1).flatten()[:count]]
    decoded: torch.Tensor = values * block_scales(state).repeat_interleave(state.blocksize)[:count]
    return decoded.to(state.dtype).view(state.shape)


def block_scales(state: Any) -> torch.Tensor:
    """Returns the scale of each block of weights, fp32 [blocks], by the formula."""
    blocks = torch.arange(-(-state.shape.numel() // state.blocksize), device=state.absmax.device)
    scales: torch.Tensor = state.absmax[: blocks.numel()]
    if not state.nested:
        return scales
    second = state.state2
    return second.code[scales.int()] * second.absmax[blocks // second.blocksize] + state.offset  # type: ignore[no-any-return]


@triton.jit
def read_scales(  # type: ignore[no-untyped-def]
    block, inside, scale_ptr, code8_ptr, scale2_ptr, offset_ptr, BLOCK2: tl.constexpr, NESTED: tl.constexpr
) -> Any:
    """Scales of blocks of weights, for kernels that are compiled without contraction."""
    if NESTED:
        level = tl.load(scale_ptr + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(code8_ptr + level) * tl.load(scale2_ptr + block // BLOCK2, mask=inside, other=0.0)
        scale = scale + tl.load(offset_ptr)
    else:
        scale = tl.load(scale_ptr + block, mask=inside, other=0.0)
    return scale


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    words_ptr, code_ptr, scale_ptr, code8_ptr, scale2_ptr, offset_ptr, out_ptr, count, words, blocks, blocks2,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, WORDS_N: tl.constexpr,
):  # fmt: skip
    # The second axis of the grid is the matrix of a stack: its words, scales, scales of scales, offset and weights.
    matrix, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * WORDS_N
    words_ptr += matrix * words + first
    scale_ptr += matrix * blocks
    scale2_ptr += matrix * blocks2
    out_ptr += matrix * count + first.to(tl.int64) * 8

    rows = tl.arange(0, WORDS_N)
    inside = first + rows < words
    word = tl.load(words_ptr + rows, mask=inside, other=0)

    block = (first + rows) // (BLOCK // 8)  # weights that share a scale
    scale = read_scales(block, inside, scale_ptr, code8_ptr, scale2_ptr, offset_ptr + matrix, BLOCK2, NESTED)

    # Bytes follow one another in a word, the first weight of each in its upper half.
    place = tl.arange(0, 8)
    number = (word[:, None] >> (4 * (place ^ 1))[None, :]) & 15
    value = tl.load(code_ptr + number)

    left = tl.minimum(count - first.to(tl.int64) * 8, WORDS_N * 8).to(tl.int32)
    offsets = rows[:, None] * 8 + place[None, :]
    tl.store(out_ptr + offsets, value * scale[:, None], mask=offsets < left)


def scale_arguments(state: Any) -> tuple[tuple[torch.Tensor, ...], dict[str, int | bool]]:
    """Returns what a kernel reads scales by: the tensors of both levels, and the constants BLOCK, BLOCK2 and NESTED."""
    constants: dict[str, int | bool] = {"BLOCK": state.blocksize, "BLOCK2": 1, "NESTED": bool(state.nested)}
    if not state.nested:
        return (state.absmax, state.code, state.code, state.code), constants
    second = state.state2
    return (state.absmax, second.code, second.absmax, state.offset), constants | {"BLOCK2": second.blocksize}


def as_words(packed: torch.Tensor) -> torch.Tensor:
    """Packed bytes [N, bytes] -> the same as words, int32 [N, ceil(bytes / 4)]; a copy if they do not lie as words."""
    missing = -packed.shape[1] % 4
    if missing or packed.data_ptr() % 4:
        packed = torch.nn.functional.pad(packed, (0, missing)).clone()
    return packed.view(torch.int32)


def dequantize(packed: torch.Tensor, state: Any, out: torch.Tensor) -> torch.Tensor:
    """Writes the weights of bitsandbytes' `packed` bytes and quant `state` to `out`, and returns `out`.

    `state` is NF4, double-quantised or not; `out` is contiguous, of the state's shape and any float type. Raises
    ValueError for another quantisation, or an `out` of another size.
    """
    if state.quant_type != "nf4" or not out.is_contiguous() or out.numel() != state.shape.numel():
        raise ValueError(f"cannot dequantise {state.quant_type} of shape {tuple(state.shape)} into {tuple(out.shape)}")

    words = as_words(packed.view(1, -1))
    tensors, constants = scale_arguments(state)
    _decode[(triton.cdiv(words.shape[1], WORDS),)](
        words, state.code, *tensors, out, out.numel(), words.shape[1], 0, 0, **constants, WORDS_N=WORDS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def dequantize_stack(stack: Any, out: torch.Tensor) -> torch.Tensor:
    """Writes the weights of an `Nf4Stack` to `out` [N, out, in], contiguous, of any float type, and returns it."""
    nested, unused = stack.code8 is not None, stack.code
    code8, scale2, offset = (stack.code8, stack.scales2, stack.offsets) if nested else (unused, unused, unused)
    words = as_words(stack.codes)

    _decode[(triton.cdiv(words.shape[1], WORDS), out.shape[0])](
        words, stack.code, stack.scales, code8, scale2, offset, out, out[0].numel(), words.shape[1],
        stack.scales.shape[1], scale2.shape[-1], BLOCK=BLOCK, BLOCK2=BLOCK2, NESTED=nested, WORDS_N=WORDS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
