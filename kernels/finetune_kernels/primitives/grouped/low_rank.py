"""Products of sorted rows with the low-rank factors of each group's adapter.

    shrink    small[s, j] = scale sum over k of x[s, k] M_g[j, k]            x [S, K], M [G, r, K] -> [S, r]
    expand    y[s, k] += scale sum over j of small[s, j] M_g[j, k]           small [S, r], y [S, K]
    outer     D_g[j, k] = scale sum over its rows of w[s] small[s, j] x[s, k]     -> [G, r, K]

Group g has the rows from `ends[g - 1]` up to `ends[g]`; it may have none. A `Factor` says which columns of the wide
side its matrix has: the gate's and the up projection's adapters lie side by side in `small`, and each product is one
launch for both. A of an adapter is a factor as it is, B [G, out, r] as its transpose; nothing is copied or padded.

A program takes a tile of rows of one group, which it finds in `ends` on the GPU, so that nothing waits for it.
PyTorch's grouped product would take two launches for each of these products, a copy that pads the rank to 8 and another
one of wide sides that begin off 16 bytes. Sums are fp32.

Source: Hu et al., "LoRA", 2021; the names are those of kernels that serve many adapters (Chen et al., "Punica", 2023).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from finetune_kernels.primitives.grouped.products import groups
from finetune_kernels.primitives.precision import before_ampere

BLOCK_S, BLOCK_K, BLOCK_R = 64, 128, 64
"""Rows, columns of the wide side, and ranks of a tile."""
MOST = 2
"""Factors of one launch."""


class Factor(NamedTuple):
    """One factor of every group's adapter."""

    m: torch.Tensor
    """M [G, r, K], of any strides."""
    columns: slice
    """Its K columns of the wide side."""
    scale: float

    def start(self) -> int:
        """First of its columns."""
        return self.columns.start or 0


def shrink(x: torch.Tensor, factors: Sequence[Factor], ends: torch.Tensor) -> torch.Tensor:
    """x [S, wide], ends int32 [G] -> [S, sum of ranks] in the type of `x`."""
    return (launch_shrink if _has_kernels(x) else reference)(x, factors, ends)


def expand(y: torch.Tensor, small: torch.Tensor, factors: Sequence[Factor], ends: torch.Tensor) -> None:
    """Adds to y [S, wide]: small [S, sum of ranks]."""
    (launch_expand if _has_kernels(y) else reference_expand)(y, small, factors, ends)


def outer(
    small: torch.Tensor, x: torch.Tensor, factors: Sequence[Factor], ends: torch.Tensor, weights: torch.Tensor | None
) -> list[torch.Tensor]:
    """small [S, sum of ranks], x [S, wide], weights w [S] or None -> a gradient for each M, of its shape and strides;
    zeros for a group without rows."""
    return (launch_outer if _has_kernels(x) else reference_outer)(small, x, factors, ends, weights)


def reference(x: torch.Tensor, factors: Sequence[Factor], ends: torch.Tensor) -> torch.Tensor:
    """Returns what `shrink` returns, group by group."""
    small = x.new_zeros(x.shape[0], sum(factor.m.shape[1] for factor in factors))
    for factor, ranks in zip(factors, _ranks(factors), strict=True):
        for group, rows in groups(ends):
            small[rows, ranks] = x[rows, factor.columns] @ factor.m[group].T * factor.scale
    return small


def reference_expand(y: torch.Tensor, small: torch.Tensor, factors: Sequence[Factor], ends: torch.Tensor) -> None:
    """Adds to `y` what `expand` adds, group by group."""
    for factor, ranks in zip(factors, _ranks(factors), strict=True):
        for group, rows in groups(ends):
            y[rows, factor.columns] += small[rows, ranks] @ factor.m[group] * factor.scale


def reference_outer(
    small: torch.Tensor, x: torch.Tensor, factors: Sequence[Factor], ends: torch.Tensor, weights: torch.Tensor | None
) -> list[torch.Tensor]:
    """Returns what `outer` returns, group by group."""
    if weights is not None:
        small = (small * weights.unsqueeze(1)).to(small.dtype)

    found = [torch.zeros_like(factor.m) for factor in factors]
    for made, factor, ranks in zip(found, factors, _ranks(factors), strict=True):
        for group, rows in groups(ends):
            made[group] = small[rows, ranks].T @ x[rows, factor.columns] * factor.scale
    return found


def _has_kernels(x: torch.Tensor) -> bool:
    return x.is_cuda and not before_ampere(x)


def _ranks(factors: Sequence[Factor]) -> list[slice]:
    """Columns of each factor in the narrow side."""
    found, first = [], 0
    for factor in factors:
        found.append(slice(first, first + factor.m.shape[1]))
        first += factor.m.shape[1]
    return found


@triton.jit
def _find(ends_ptr, tile, n_groups, GROUPS: tl.constexpr, BLOCK_S: tl.constexpr):  # type: ignore[no-untyped-def]
    """Group of a tile of rows, its first row, and the row behind the group's last; without rows past the last tile."""
    group = tl.arange(0, GROUPS)
    end = tl.load(ends_ptr + group, mask=group < n_groups, other=0)
    begin = tl.load(ends_ptr + group - 1, mask=(group > 0) & (group < n_groups), other=0)

    tiles = (end - begin + BLOCK_S - 1) // BLOCK_S
    behind = tl.cumsum(tiles, 0)
    found = tl.sum((behind <= tile).to(tl.int32), 0)

    mine = group == found
    first = tl.sum(tl.where(mine, begin + (tile - behind + tiles) * BLOCK_S, 0), 0)
    return tl.minimum(found, n_groups - 1).to(tl.int64), first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _shrink(  # type: ignore[no-untyped-def]
    x_ptr, m0_ptr, m1_ptr, out_ptr, ends_ptr, n_groups, n_cols, start0, start1, scale0, scale1, stride_x, stride_out,
    stride_g, stride_r, stride_k, R: tl.constexpr, BLOCK_R: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group, first, end = _find(ends_ptr, tl.program_id(0), n_groups, GROUPS, BLOCK_S)
    factor = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = first + tl.arange(0, BLOCK_S)
    here = (rows < end)[:, None]
    if first < end:
        start, scale, m_ptr = start0, scale0, m0_ptr
        if factor == 1:
            start, scale, m_ptr = start1, scale1, m1_ptr

        x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_x + start
        m_rows = m_ptr + group * stride_g + ranks[None, :] * stride_r
        total = tl.zeros((BLOCK_S, BLOCK_R), dtype=tl.float32)
        for begin in range(0, n_cols, BLOCK_K):
            columns = begin + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + columns[None, :], mask=here & (columns < n_cols)[None, :], other=0.0)
            mask = (columns < n_cols)[:, None] & (ranks < R)[None, :]
            m = tl.load(m_rows + columns[:, None] * stride_k, mask=mask, other=0.0)
            total = tl.dot(x, m, total, input_precision=PRECISION)

        out = out_ptr + rows.to(tl.int64)[:, None] * stride_out + factor * R + ranks[None, :]
        tl.store(out, (total * scale).to(out_ptr.dtype.element_ty), mask=here & (ranks < R)[None, :])


@triton.jit
def _product(small, m, stride_r, here, inside, R: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """small [S, R] M [R, K] in fp32; `here` and `inside` are the rows and columns that exist."""
    total = tl.zeros((here.shape[0], inside.shape[0]), dtype=tl.float32)
    for begin in range(0, R, BLOCK_R):
        ranks = begin + tl.arange(0, BLOCK_R)
        part = tl.load(small + ranks[None, :], mask=here & (ranks < R)[None, :], other=0.0)
        matrix = tl.load(m + ranks[:, None] * stride_r, mask=(ranks < R)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(part, matrix, total, input_precision=PRECISION)
    return total


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    y_ptr, small_ptr, m0_ptr, m1_ptr, ends_ptr, n_groups, n_cols, start0, start1, scale0, scale1, stride_y,
    stride_small, stride_g, stride_r, stride_k, R: tl.constexpr, BLOCK_R: tl.constexpr, TOGETHER: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group, first, end = _find(ends_ptr, tl.program_id(0), n_groups, GROUPS, BLOCK_S)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    factor = tl.program_id(2)
    rows = first + tl.arange(0, BLOCK_S)
    here = (rows < end)[:, None]
    if first < end:
        start, scale, m_ptr = start0, scale0, m0_ptr
        if factor == 1:
            start, scale, m_ptr = start1, scale1, m1_ptr

        mask = here & (columns < n_cols)[None, :]
        place = y_ptr + rows.to(tl.int64)[:, None] * stride_y + start + columns[None, :]
        small = small_ptr + rows.to(tl.int64)[:, None] * stride_small + factor * R
        m_columns = group * stride_g + columns[None, :] * stride_k
        inside = columns < n_cols
        total = scale * _product(small, m_ptr + m_columns, stride_r, here, inside, R, BLOCK_R, PRECISION)
        if TOGETHER:
            total += scale1 * _product(small + R, m1_ptr + m_columns, stride_r, here, inside, R, BLOCK_R, PRECISION)

        total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _outer(  # type: ignore[no-untyped-def]
    small_ptr, x_ptr, weights_ptr, d0_ptr, d1_ptr, ends_ptr, n_cols, start0, start1, scale0, scale1, stride_small,
    stride_x, stride_g, stride_r, stride_k, R: tl.constexpr, BLOCK_R: tl.constexpr, FACTORS: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group, factor = tl.program_id(0).to(tl.int64), tl.program_id(2) % FACTORS
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(2) // FACTORS * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(ends_ptr + group)

    start, scale, d_ptr = start0, scale0, d0_ptr
    if factor == 1:
        start, scale, d_ptr = start1, scale1, d1_ptr
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for first in range(begin, end, BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        here, offsets = rows < end, rows.to(tl.int64)
        mask = (ranks < R)[:, None] & here[None, :]
        small = tl.load(small_ptr + offsets[None, :] * stride_small + factor * R + ranks[:, None], mask=mask, other=0.0)
        if WEIGHTED:
            weights = tl.load(weights_ptr + offsets, mask=here, other=0.0)
            small = (small * weights[None, :]).to(small_ptr.dtype.element_ty)
        mask = here[:, None] & (columns < n_cols)[None, :]
        x = tl.load(x_ptr + offsets[:, None] * stride_x + start + columns[None, :], mask=mask, other=0.0)
        total = tl.dot(small, x, total, input_precision=PRECISION)

    place = d_ptr + group * stride_g + ranks.to(tl.int64)[:, None] * stride_r + columns[None, :] * stride_k
    mask = (ranks < R)[:, None] & (columns < n_cols)[None, :]
    tl.store(place, (total * scale).to(d_ptr.dtype.element_ty), mask=mask)


def launch_shrink(x: torch.Tensor, factors: Sequence[Factor], ends: torch.Tensor) -> torch.Tensor:
    """Runs the kernel of `shrink`."""
    first, last = _pair(factors)
    count, rank, n_cols = first.m.shape
    small = x.new_empty(x.shape[0], len(factors) * rank)
    block_r = _rank_block(rank)

    grid = (_row_tiles(x, count), len(factors), triton.cdiv(rank, block_r))
    _shrink[grid](
        x, first.m, last.m, small, ends, count, n_cols, first.start(), last.start(), first.scale, last.scale,
        x.stride(0), small.stride(0), *first.m.stride(), R=rank, BLOCK_R=block_r,
        GROUPS=triton.next_power_of_2(count), BLOCK_S=BLOCK_S, BLOCK_K=BLOCK_K, PRECISION="ieee",
    )  # fmt: skip
    return small


def launch_expand(y: torch.Tensor, small: torch.Tensor, factors: Sequence[Factor], ends: torch.Tensor) -> None:
    """Runs the kernel of `expand`."""
    first, last = _pair(factors)
    count, rank, n_cols = first.m.shape
    # Two factors of the same columns are added by one program: others would write over each other.
    together = len(factors) == MOST and first.start() == last.start()

    grid = (_row_tiles(y, count), triton.cdiv(n_cols, BLOCK_K), 1 if together else len(factors))
    _expand[grid](
        y, small, first.m, last.m, ends, count, n_cols, first.start(), last.start(), first.scale, last.scale,
        y.stride(0), small.stride(0), *first.m.stride(), R=rank, BLOCK_R=_rank_block(rank), TOGETHER=together,
        GROUPS=triton.next_power_of_2(count), BLOCK_S=BLOCK_S, BLOCK_K=BLOCK_K, PRECISION="ieee",
    )  # fmt: skip


def launch_outer(
    small: torch.Tensor, x: torch.Tensor, factors: Sequence[Factor], ends: torch.Tensor, weights: torch.Tensor | None
) -> list[torch.Tensor]:
    """Runs the kernel of `outer`."""
    first, last = _pair(factors)
    count, rank, n_cols = first.m.shape
    found = [torch.empty_like(factor.m) for factor in factors]
    block_r = _rank_block(rank)

    grid = (count, triton.cdiv(n_cols, BLOCK_K), triton.cdiv(rank, block_r) * len(factors))
    _outer[grid](
        small, x, small if weights is None else weights, found[0], found[-1], ends, n_cols, first.start(), last.start(),
        first.scale, last.scale, small.stride(0), x.stride(0), *found[0].stride(), R=rank, BLOCK_R=block_r,
        FACTORS=len(factors), WEIGHTED=weights is not None, BLOCK_S=BLOCK_S, BLOCK_K=BLOCK_K, PRECISION="ieee",
    )  # fmt: skip
    return found


def _pair(factors: Sequence[Factor]) -> tuple[Factor, Factor]:
    """First and last factor; they have one shape and one layout."""
    first, last = factors[0], factors[-1]
    if len(factors) > MOST or (first.m.shape, first.m.stride()) != (last.m.shape, last.m.stride()):
        raise ValueError(f"a launch takes up to {MOST} factors of one shape, got {[tuple(f.m.shape) for f in factors]}")
    return first, last


def _rank_block(rank: int) -> int:
    return int(min(BLOCK_R, max(16, triton.next_power_of_2(rank))))


def _row_tiles(rows: torch.Tensor, count: int) -> int:
    """Returns the largest number of tiles that `count` groups can have."""
    return rows.shape[0] // BLOCK_S + count
