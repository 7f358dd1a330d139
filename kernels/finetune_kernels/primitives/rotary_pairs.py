"""Parts of RoPE's kernels, which have a row of q, k and v in registers as pairs of elements [BLOCK_H, BLOCK_D]: where
the pairs are, by what they turn, and the gradients of a row's heads."""

import triton
import triton.language as tl


@triton.jit
def _pairs(D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, NEXT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs of elements of a head: the offsets of both, whether they exist, and whether they are rotated. Elements that
    are not rotated are paired alike, so that one pass takes all."""
    pair = tl.arange(0, BLOCK_D)
    if NEXT:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + D // 2
        if R != D:
            first = tl.where(pair < R // 2, pair, pair + R // 2)
            second = first + tl.where(pair < R // 2, R // 2, (D - R) // 2)
    return first, second, (pair < D // 2)[None, :], pair < R // 2


@triton.jit
def _load_cos_sin(  # type: ignore[no-untyped-def]
    cos_ptr, sin_ptr, row, head, rotates, H: tl.constexpr, H_KV: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE: tl.constexpr,
):  # fmt: skip
    """cos and sin of each pair, [1, BLOCK_D], or with v's heads among the others [BLOCK_H, BLOCK_D]; 1 and 0 where it
    is not rotated."""
    pair = tl.arange(0, BLOCK_D)
    c = tl.load(cos_ptr + row * R + pair, mask=rotates, other=1.0)[None, :].to(tl.float32)
    s = tl.load(sin_ptr + row * R + pair, mask=rotates, other=0.0)[None, :].to(tl.float32)
    if VALUE:
        turns = (head < H + H_KV)[:, None]
        c = tl.where(turns, c, 1.0)
        s = tl.where(turns, s, 0.0)
    return c, s


@triton.jit
def _load_dq_dk(dq_ptr, dk_ptr, row, head, offsets, q, k, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements `offsets` of the gradients of q's and k's heads, [BLOCK_H, BLOCK_D]."""
    d = tl.load(dq_ptr + row * H * D + head[:, None] * D + offsets[None, :], mask=q, other=0.0).to(tl.float32)
    offsets_k = row * H_KV * D + (head - H)[:, None] * D + offsets[None, :]
    return d + tl.load(dk_ptr + offsets_k, mask=k, other=0.0).to(tl.float32)


@triton.jit
def _load_dv(dv_ptr, row, head, offsets, v, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same of v's heads; 0 in the others."""
    offsets_v = row * H_KV * D + (head - H - H_KV)[:, None] * D
    return tl.load(dv_ptr + offsets_v + offsets[None, :], mask=v, other=0.0).to(tl.float32)
