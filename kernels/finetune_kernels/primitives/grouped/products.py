"""Products of rows that are sorted into groups, each with a frozen matrix of its own.

    linear    y[s] = x[s] W_g^T             x [S, in], W [G, out, in] -> [S, out]
    backward  dx[s] = dy[s] W_g             dy [S, out], W [G, out, in] -> [S, in]

Group g has the rows from `ends[g - 1]` up to `ends[g]`; it may have none. On CUDA in bfloat16 all groups are one launch
of PyTorch's grouped product, which reads `ends` on the GPU, so that nothing waits for it; elsewhere, and for sizes that
it does not take, a loop over groups is the reference.
"""

from collections.abc import Iterator

import torch

ALIGNMENT = 8
"""Elements of 16 bits in the 16 bytes by which every row must be aligned."""


def can_group(*sizes: int, x: torch.Tensor) -> bool:
    """True if PyTorch's grouped product takes rows of these sizes, and the type and device of `x`."""
    return x.is_cuda and x.dtype is torch.bfloat16 and x.shape[0] > 0 and all(size % ALIGNMENT == 0 for size in sizes)


def linear(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [S, in], W [G, out, in], ends int32 [G] -> y [S, out]."""
    if can_group(*w.shape[1:], x.stride(0), x=x):
        return torch._grouped_mm(x, w.transpose(1, 2), offs=ends)

    y = x.new_zeros(x.shape[0], w.shape[1])
    for group, rows in groups(ends):
        y[rows] = x[rows] @ w[group].T
    return y


def backward(dy: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """dy [S, out], W [G, out, in], ends int32 [G] -> dx [S, in]."""
    if can_group(*w.shape[1:], dy.stride(0), x=dy):
        return torch._grouped_mm(dy, w, offs=ends)

    dx = dy.new_zeros(dy.shape[0], w.shape[2])
    for group, rows in groups(ends):
        dx[rows] = dy[rows] @ w[group]
    return dx


def groups(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Each group that has rows, and its rows."""
    first = 0
    for group, end in enumerate(ends.tolist()):
        if end > first:
            yield group, slice(first, end)
        first = end
