"""Dropout of the adapters' inputs, whose masks are never kept: they are drawn again wherever they are used.

    drop(x) = mask / (1 - p) * x,   dx += mask / (1 - p) * (d A)             d A: the share of an adapter behind `drop`

Element (row, column) stays if the half word column % 8 of Philox-4x32-7 says so, with the pass's seed as its key and
(column // 8, row, philox_stream, 0) as its counter. So a mask depends on no launch, tile or order: forward, a forward
that is made again and backward see the same one, and each linear (`philox_stream`) has its own. A mask that is kept
costs a byte an element where the layer keeps two; packed into bits, it would still have to be unpacked beside the same
loads. Whole words would need twice the operations, and Triton's usual ten rounds half as many again; seven pass
BigCrush (Salmon et al., 2011).
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from finetune_kernels.primitives.precision import widen

BLOCK_T, BLOCK_N, BLOCK_R, WARPS = 32, 128, 64, 4
SEEDS = 2**31
STEPS = 2**16
"""A share p is rounded to a multiple of 1 / STEPS, and stays below 1."""
WORD = 2**32 - 1
ROUNDS = tl.constexpr(7)


@dataclass(frozen=True)
class DropoutSeed:
    """What decides all masks of one pass through a layer; `first_row`: where a tile begins."""

    value: int
    first_row: int = 0


@dataclass(frozen=True)
class Mask:
    """Which elements of one linear's input are dropped."""

    seed: DropoutSeed
    philox_stream: int
    """Of the linear, within its layer."""
    p: float

    def from_row(self, row: int) -> "Mask":
        """For rows that begin `row` further on."""
        return replace(self, seed=replace(self.seed, first_row=self.seed.first_row + row))

    @property
    def threshold(self) -> int:
        """Half words below it are dropped."""
        return min(round(self.p * STEPS), STEPS - 1)

    @property
    def factor(self) -> float:
        """1 / (1 - p) for the p that is a multiple of 1 / STEPS, so that nothing changes on average."""
        return STEPS / (STEPS - self.threshold)


def new_dropout_seed() -> DropoutSeed:
    """From PyTorch's CPU generator, whose state a checkpoint keeps; the GPU is not waited for."""
    return DropoutSeed(int(torch.randint(SEEDS, ()).item()))


def keep_mask(mask: Mask, rows: int, columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The mask [rows, columns] itself, by PyTorch: True where an element stays."""
    groups = -(-columns // 8)
    first = mask.seed.first_row
    row = torch.arange(first, first + rows, device=device).unsqueeze(1).expand(rows, groups)
    group = torch.arange(groups, device=device).expand(rows, groups)
    words = torch.stack(_philox(mask.seed.value, group, row, torch.full_like(row, mask.philox_stream)), dim=-1)
    halves = torch.stack((words & STEPS - 1, words >> 16), dim=-1)
    return halves.flatten(1)[:, :columns] >= mask.threshold


def _philox(seed: int, *counter: torch.Tensor) -> list[torch.Tensor]:
    """Four words, each in an int64; the counter's fourth is 0."""
    c0, c1, c2 = counter
    c3 = torch.zeros_like(c0)
    k0, k1 = seed, 0
    for _ in range(ROUNDS.value):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the upper bits wrap around, and are right
        c0, c1 = (second >> 32 & WORD) ^ c1 ^ k0, second & WORD
        c2, c3 = (first >> 32 & WORD) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def reference(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    """`drop` by PyTorch."""
    return (widen(x) * keep_mask(mask, x.shape[0], x.shape[1], x.device) * mask.factor).to(x.dtype)


def reference_add_lora_dx(dx: torch.Tensor, d: torch.Tensor, a: torch.Tensor, mask: Mask) -> torch.Tensor:
    """`add_lora_dx` by PyTorch."""
    share = widen(d) @ widen(a) * keep_mask(mask, dx.shape[0], dx.shape[1], dx.device) * mask.factor
    return dx.copy_(widen(dx) + share)


@triton.jit
def _keep_mask(rows, group, seed, philox_stream, threshold, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mask of a tile: `rows` [BLOCK_T] and 8 * GROUPS columns from 8 * `group` on."""
    zero = tl.zeros((BLOCK_T, GROUPS), tl.int32)
    first, second, third, fourth = tl.philox(
        seed, zero + (group + tl.arange(0, GROUPS))[None, :], zero + rows[:, None], zero + philox_stream, zero, ROUNDS
    )
    words = tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["seed", "philox_stream", "first_row", "threshold"])
def _drop(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    t,
    n,
    stride,
    factor,
    seed,
    philox_stream,
    first_row,
    threshold,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < t)[:, None] & (columns < n)[None, :]
    stays = _keep_mask(
        first_row + rows, tl.program_id(1) * (BLOCK_N // 8), seed, philox_stream, threshold, BLOCK_T, BLOCK_N // 8
    )
    rows = rows.to(tl.int64)
    x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * n + columns[None, :], tl.where(stays, x * factor, 0.0), mask=inside)


@triton.jit(do_not_specialize=["seed", "philox_stream", "first_row", "threshold"])
def _add_lora_dx(  # type: ignore[no-untyped-def]
    dx_ptr, d_ptr, a_ptr, t, n, r, stride_d, factor, seed, philox_stream, first_row, threshold,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known, wanted = (rows < t)[:, None], (columns < n)[None, :]
    stays = _keep_mask(
        first_row + rows, tl.program_id(1) * (BLOCK_N // 8), seed, philox_stream, threshold, BLOCK_T, BLOCK_N // 8
    )
    rows = rows.to(tl.int64)
    share = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in range(0, r, BLOCK_R):
        rank = first + tl.arange(0, BLOCK_R)
        d = tl.load(d_ptr + rows[:, None] * stride_d + rank[None, :], mask=known & (rank < r)[None, :], other=0.0)
        at = rank.to(tl.int64)[:, None] * n + columns[None, :]
        share += tl.dot(d, tl.load(a_ptr + at, mask=(rank < r)[:, None] & wanted, other=0.0))
    at = rows[:, None] * n + columns[None, :]
    dx = tl.load(dx_ptr + at, mask=known & wanted, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx + tl.where(stays, share * factor, 0.0), mask=known & wanted)


def _drawn(mask: Mask) -> tuple[float, int, int, int, int]:
    return mask.factor, mask.seed.value, mask.philox_stream, mask.seed.first_row, mask.threshold


def drop(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    """drop(x) [T, N], contiguous; rows of `x` may be strided."""
    t, n = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(t, n)
    if t:
        grid = triton.cdiv(t, BLOCK_T), triton.cdiv(n, BLOCK_N)
        _drop[grid](x, y, t, n, x.stride(0), *_drawn(mask), BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, num_warps=WARPS)
    return y


def add_lora_dx(dx: torch.Tensor, d: torch.Tensor, a: torch.Tensor, mask: Mask) -> torch.Tensor:
    """dx [T, N] += mask / (1 - p) * d A, in place; d [T, r], rows may be strided; A [r, N]. Returns `dx`."""
    t, n = dx.shape
    block = min(BLOCK_R, max(16, triton.next_power_of_2(a.shape[0])))
    if t:
        _add_lora_dx[(triton.cdiv(t, BLOCK_T), triton.cdiv(n, BLOCK_N))](
            dx, d, a.contiguous(), t, n, a.shape[0], d.stride(0), *_drawn(mask),
            BLOCK_R=block, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, num_warps=WARPS,
        )  # fmt: skip
    return dx
