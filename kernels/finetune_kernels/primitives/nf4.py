"""NF4 weights dequantised in one pass, equal to bitsandbytes' result to the bit.

    w[i] = code[q[i]] * absmax[i / 64],   absmax[b] = code8[a[b]] * absmax2[b / 256] + offset

Shapes: packed bytes, two weights each, and the quant state that bitsandbytes keeps -> [out, in] in any float type.
A stack of matrices (experts) is decoded in one launch: each has its own scales and offset, as if it were alone.

bitsandbytes computes the scales in a pass of their own, in fp32, and keeps them while it decodes; here both levels are
read where they are used. The scale is rounded after the product and after the sum, as there: contraction to one
multiply-add is switched off.

Source: Dettmers et al., "QLoRA", 2023, section 3 (NF4 and double quantisation).
"""

from typing import Any

import torch
import triton
import triton.language as tl

BYTES = 2048
"""Packed bytes per program, of two weights each."""
BLOCK, BLOCK2 = 64, 256
"""Weights that share a scale in a stack, and scales that share a scale of their own: bitsandbytes' defaults."""


def reference(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Returns the formula's weights in fp32, rounded to the state's type, in the state's shape [out, in]."""
    flat, count = packed.flatten().int(), state.shape.numel()
    blocks = torch.arange(-(-count // state.blocksize), device=packed.device)

    scales = state.absmax[: blocks.numel()]  # [blocks]
    if state.nested:
        second = state.state2
        scales = second.code[scales.int()] * second.absmax[blocks // second.blocksize] + state.offset

    values = state.code[torch.stack((flat >> 4, flat & 15), dim=1).flatten()[:count]]
    decoded: torch.Tensor = values * scales.repeat_interleave(state.blocksize)[:count]
    return decoded.to(state.dtype).view(state.shape)


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    packed_ptr, code_ptr, scale_ptr, code8_ptr, scale2_ptr, offset_ptr, out_ptr, count, bytes_n, blocks, blocks2,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, BYTES_N: tl.constexpr,
):  # fmt: skip
    # The second axis of the grid is the matrix of a stack: its bytes, scales, scales of scales, offset and weights.
    matrix = tl.program_id(1).to(tl.int64)
    packed_ptr += matrix * bytes_n
    scale_ptr += matrix * blocks
    scale2_ptr += matrix * blocks2
    offset_ptr += matrix
    out_ptr += matrix * count

    offsets = tl.program_id(0).to(tl.int64) * BYTES_N + tl.arange(0, BYTES_N)  # of packed bytes
    mask = 2 * offsets < count
    byte = tl.load(packed_ptr + offsets, mask=mask, other=0).to(tl.int32)

    block = 2 * offsets // BLOCK  # weights that share a scale
    if NESTED:
        level = tl.load(scale_ptr + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(code8_ptr + level) * tl.load(scale2_ptr + block // BLOCK2, mask=mask, other=0.0)
        scale = scale + tl.load(offset_ptr)
    else:
        scale = tl.load(scale_ptr + block, mask=mask, other=0.0)

    high = tl.load(code_ptr + (byte >> 4)) * scale
    low = tl.load(code_ptr + (byte & 15)) * scale
    both = tl.interleave(high, low)
    offsets_w = tl.program_id(0).to(tl.int64) * BYTES_N * 2 + tl.arange(0, BYTES_N * 2)
    tl.store(out_ptr + offsets_w, both, mask=offsets_w < count)


def dequantize(packed: torch.Tensor, state: Any, out: torch.Tensor) -> torch.Tensor:
    """Writes the weights of bitsandbytes' `packed` bytes and quant `state` to `out`, and returns `out`.

    `state` is NF4, double-quantised or not; `out` is contiguous, of the state's shape and any float type. Raises
    ValueError for another quantisation, or an `out` of another size.
    """
    if state.quant_type != "nf4" or not out.is_contiguous() or out.numel() != state.shape.numel():
        raise ValueError(f"cannot dequantise {state.quant_type} of shape {tuple(state.shape)} into {tuple(out.shape)}")

    code8, scale2, offset, block2 = state.code, state.code, state.code, 1
    if state.nested:
        code8, scale2 = state.state2.code, state.state2.absmax
        offset, block2 = state.offset, state.state2.blocksize

    count = out.numel()
    _decode[(triton.cdiv(triton.cdiv(count, 2), BYTES),)](
        packed, state.code, state.absmax, code8, scale2, offset, out, count, 0, 0, 0,
        BLOCK=state.blocksize, BLOCK2=block2, NESTED=bool(state.nested), BYTES_N=BYTES, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def dequantize_stack(stack: Any, out: torch.Tensor) -> torch.Tensor:
    """Writes the weights of an `Nf4Stack` to `out` [N, out, in], contiguous, of any float type, and returns it."""
    nested, unused = stack.code8 is not None, stack.code
    code8, scale2, offset = (stack.code8, stack.scales2, stack.offsets) if nested else (unused, unused, unused)
    matrices, count = out.shape[0], out[0].numel()

    _decode[(triton.cdiv(triton.cdiv(count, 2), BYTES), matrices)](
        stack.codes, stack.code, stack.scales, code8, scale2, offset, out, count, stack.codes.shape[1],
        stack.scales.shape[1], scale2.shape[-1], BLOCK=BLOCK, BLOCK2=BLOCK2, NESTED=nested, BYTES_N=BYTES,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
