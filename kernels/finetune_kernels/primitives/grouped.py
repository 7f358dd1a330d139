"""Products of rows that are sorted into groups, each with a matrix of its own, and their way back: what a mixture of
experts computes.

    linear    y[s] = x[s] W_g^T             x [S, in], W [G, out, in] -> [S, out]
    backward  dx[s] = dy[s] W_g             dy [S, out], W [G, out, in] -> [S, in]
    outer     D_g = sum over its rows of d[s]^T x[s]      d [S, r], x [S, in] -> [G, r, in]
    combine   out[t] = sum over c of w[t, c] z[places[t, c]]    z [S, H], places and w [T, k] -> [T, H]

Group g has the rows from `ends[g - 1]` up to `ends[g]`; it may have none. On CUDA in bfloat16 all groups are one launch
of PyTorch's grouped product, which reads `ends` on the GPU, so that nothing waits for it; elsewhere, and for sizes that
it does not take, a loop over groups is the reference.

`combine` is a kernel of ours, with sums in fp32; without weights, w is 1. One launch takes the place of a copy of z in
the tokens' order and of k products and sums.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

ALIGNMENT = 8
"""Elements of 16 bits in the 16 bytes by which every row must be aligned."""
MAX_BLOCK = 2048
"""Elements of a row that one program sums."""


def can_group(*sizes: int, x: torch.Tensor) -> bool:
    """True if PyTorch's grouped product takes rows of these sizes, and the type and device of `x`."""
    return x.is_cuda and x.dtype is torch.bfloat16 and x.shape[0] > 0 and all(size % ALIGNMENT == 0 for size in sizes)


def linear(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [S, in], W [G, out, in], ends int32 [G] -> y [S, out]."""
    if can_group(*w.shape[1:], x.stride(0), x=x):
        return torch._grouped_mm(x, w.transpose(1, 2), offs=ends)

    y = x.new_zeros(x.shape[0], w.shape[1])
    for group, rows in _groups(ends):
        y[rows] = x[rows] @ w[group].T
    return y


def backward(dy: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """dy [S, out], W [G, out, in], ends int32 [G] -> dx [S, in]."""
    if can_group(*w.shape[1:], dy.stride(0), x=dy):
        return torch._grouped_mm(dy, w, offs=ends)

    dx = dy.new_zeros(dy.shape[0], w.shape[2])
    for group, rows in _groups(ends):
        dx[rows] = dy[rows] @ w[group]
    return dx


def outer(d: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """d [S, r], x [S, in], ends int32 [G] -> [G, r, in]; zeros for a group without rows."""
    if can_group(d.shape[1], x.shape[1], d.stride(0), x.stride(0), x=x):
        found = torch._grouped_mm(d.T, x, offs=ends)
        # The grouped product leaves the matrix of an empty group as it finds it.
        empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        return found.masked_fill_(empty[:, None, None], 0.0)

    products = x.new_zeros(ends.numel(), d.shape[1], x.shape[1])
    for group, rows in _groups(ends):
        products[group] = d[rows].T @ x[rows]
    return products


def _groups(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Each group that has rows, and its rows."""
    first = 0
    for group, end in enumerate(ends.tolist()):
        if end > first:
            yield group, slice(first, end)
        first = end


def reference(z: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Returns the formula's sums, in fp32 or wider and rounded to the type of `z`."""
    total = z.new_zeros(places.shape[0], z.shape[1], dtype=torch.promote_types(z.dtype, torch.float32))
    for choice in range(places.shape[1]):
        part = z[places[:, choice]]
        total += part if weights is None else part * weights[:, choice].unsqueeze(1).to(total.dtype)
    return total.to(z.dtype)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    z_ptr, places_ptr, weights_ptr, out_ptr, n_cols, CHOSEN: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < n_cols

    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for choice in range(CHOSEN):
        row = tl.load(places_ptr + token * CHOSEN + choice).to(tl.int64)
        part = tl.load(z_ptr + row * n_cols + columns, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            part = part * tl.load(weights_ptr + token * CHOSEN + choice).to(tl.float32)
        total += part
    tl.store(out_ptr + token * n_cols + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine(z: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """z [S, H] contiguous, places int64 [T, k] and weights [T, k] or None -> [T, H] in the type of `z`."""
    tokens, chosen = places.shape
    out = z.new_empty(tokens, z.shape[1])
    block = min(MAX_BLOCK, triton.next_power_of_2(z.shape[1]))
    _combine[(tokens, triton.cdiv(z.shape[1], block))](
        z, places.contiguous(), places if weights is None else weights.contiguous(), out, z.shape[1],
        CHOSEN=chosen, WEIGHTED=weights is not None, BLOCK_N=block,
    )  # fmt: skip
    return out
