"""Dropout of the adapters' inputs, whose masks are never stored: they are drawn again wherever they are used.

    drop(x) = mask / (1 - p) * x,      dx += mask / (1 - p) * (d_xa A)           for an adapter whose input is dropped

Shapes: x and dx [T, in], d_xa [T, r], A [r, in] in any float type; sums are fp32 and rounded once.

Element (row, column) stays if the half word column % 8 of Philox-4x32-7 is not below a threshold, with the pass's seed
as its key and (column // 8, row, philox_stream, 0) as its counter. So a mask depends on no launch, tile or order:
forward, a recomputed forward and backward see the same one, and each linear (`philox_stream`) has its own. A stored
mask costs a byte an element where the layer stores two; packed into bits, it would still have to be unpacked beside the
same loads. Whole words would need twice the operations, and Triton's usual ten rounds half as many again.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011 (Philox; seven rounds pass BigCrush).
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from finetune_kernels.primitives.precision import before_ampere, widen

BLOCK_T, BLOCK_N, BLOCK_R, WARPS = 32, 128, 64, 4
SEEDS = 2**31
"""Number of seeds; one is drawn for each pass through a layer."""
STEPS = 2**16
"""Values of a half word: p is rounded to a multiple of 1 / STEPS, and stays below 1."""
WORD = 2**32 - 1
"""Bits of a word."""
ROUNDS = tl.constexpr(7)


@dataclass(frozen=True)
class DropoutSeed:
    """The seed of all masks of one pass through a layer."""

    value: int
    """Philox's key."""
    first_row: int = 0
    """Row of the layer's input where a tile begins."""


@dataclass(frozen=True)
class Mask:
    """The mask of one linear's input."""

    seed: DropoutSeed
    philox_stream: int
    """Number of the linear within its layer, which is a word of Philox's counter."""
    p: float
    """Probability that an element is dropped."""

    def from_row(self, row: int) -> "Mask":
        """Returns the mask of the rows from `row` on."""
        return replace(self, seed=replace(self.seed, first_row=self.seed.first_row + row))

    @property
    def threshold(self) -> int:
        """Half word below which an element is dropped."""
        return min(round(self.p * STEPS), STEPS - 1)

    @property
    def factor(self) -> float:
        """1 / (1 - p) for the p that is a multiple of 1 / STEPS, so that nothing changes on average."""
        return STEPS / (STEPS - self.threshold)


def new_dropout_seed() -> DropoutSeed:
    """Draws a seed from PyTorch's CPU generator, whose state a checkpoint keeps; does not wait for the GPU."""
    return DropoutSeed(int(torch.randint(SEEDS, ()).item()))


def keep_mask(mask: Mask, rows: int, columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns the mask itself, bool [rows, columns], by PyTorch: True where an element stays."""
    groups = -(-columns // 8)  # of eight half words, from one counter
    first = mask.seed.first_row
    row = torch.arange(first, first + rows, device=device).unsqueeze(1).expand(rows, groups)
    group = torch.arange(groups, device=device).expand(rows, groups)

    words = torch.stack(_philox(mask.seed.value, group, row, torch.full_like(row, mask.philox_stream)), dim=-1)
    half_words = torch.stack((words & STEPS - 1, words >> 16), dim=-1)  # [rows, groups, 4, 2]
    return half_words.flatten(1)[:, :columns] >= mask.threshold


def _philox(seed: int, *counter: torch.Tensor) -> list[torch.Tensor]:
    """Returns the generator's four words, each in an int64; the counter's fourth word is 0."""
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
    """Returns what `drop` returns, by PyTorch."""
    return (widen(x) * keep_mask(mask, x.shape[0], x.shape[1], x.device) * mask.factor).to(x.dtype)


def reference_add_lora_dx(dx: torch.Tensor, d_xa: torch.Tensor, a: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Does what `add_lora_dx` does, by PyTorch."""
    product = widen(d_xa) @ widen(a) * keep_mask(mask, dx.shape[0], dx.shape[1], dx.device) * mask.factor
    return dx.copy_(widen(dx) + product)


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
    x_ptr, y_ptr, t, n, stride, factor, seed, philox_stream, first_row, threshold,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < t)[:, None] & (columns < n)[None, :]

    stays = _keep_mask(
        first_row + rows, tl.program_id(1) * (BLOCK_N // 8), seed, philox_stream, threshold, BLOCK_T, BLOCK_N // 8
    )

    rows = rows.to(tl.int64)  # a row's offset may exceed 2^31
    x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * n + columns[None, :], tl.where(stays, x * factor, 0.0), mask=mask)


@triton.jit(do_not_specialize=["seed", "philox_stream", "first_row", "threshold"])
def _add_lora_dx(  # type: ignore[no-untyped-def]
    dx_ptr, dxa_ptr, a_ptr, t, n, r, stride_d, factor, seed, philox_stream, first_row, threshold,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = (rows < t)[:, None], (columns < n)[None, :]

    stays = _keep_mask(
        first_row + rows, tl.program_id(1) * (BLOCK_N // 8), seed, philox_stream, threshold, BLOCK_T, BLOCK_N // 8
    )

    rows = rows.to(tl.int64)
    product = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)  # d_xa A
    for first in range(0, r, BLOCK_R):
        rank = first + tl.arange(0, BLOCK_R)
        d_mask = row_mask & (rank < r)[None, :]
        d_xa = tl.load(dxa_ptr + rows[:, None] * stride_d + rank[None, :], mask=d_mask, other=0.0)
        offsets_a = rank.to(tl.int64)[:, None] * n + columns[None, :]
        product += tl.dot(d_xa, tl.load(a_ptr + offsets_a, mask=(rank < r)[:, None] & column_mask, other=0.0))

    offsets = rows[:, None] * n + columns[None, :]
    dx = tl.load(dx_ptr + offsets, mask=row_mask & column_mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, dx + tl.where(stays, product * factor, 0.0), mask=row_mask & column_mask)


def _arguments(mask: Mask) -> tuple[float, int, int, int, int]:
    return mask.factor, mask.seed.value, mask.philox_stream, mask.seed.first_row, mask.threshold


def drop(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Returns drop(x) [T, in], contiguous; rows of `x` may be strided."""
    t, n = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(t, n)
    if t:
        grid = triton.cdiv(t, BLOCK_T), triton.cdiv(n, BLOCK_N)
        _drop[grid](x, y, t, n, x.stride(0), *_arguments(mask), BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, num_warps=WARPS)
    return y


def add_lora_dx(dx: torch.Tensor, d_xa: torch.Tensor, a: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Adds mask / (1 - p) * d_xa A to dx [T, in] in place, and returns `dx`.

    `d_xa` is [T, r], with rows that may be strided; `a` is [r, in].
    """
    t, n = dx.shape
    most = 16 if before_ampere(dx) else BLOCK_R  # ranks at a time
    block = min(most, max(16, triton.next_power_of_2(a.shape[0])))
    if t:
        _add_lora_dx[(triton.cdiv(t, BLOCK_T), triton.cdiv(n, BLOCK_N))](
            dx, d_xa, a.contiguous(), t, n, a.shape[0], d_xa.stride(0), *_arguments(mask),
            BLOCK_R=block, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, num_warps=WARPS,
        )  # fmt: skip
    return dx
