"""The language model's head and its cross entropy with the head in host memory: two blocks of the vocabulary at a time
are on the GPU.

    loss = sum over rows of  m + log(l) - z[target],    z = softcap(h W^T),  m = max z,  l = sum exp(z - m)
    dh   = a / l - slope[target] W[target],             a = sum over v of exp(z_v - m) slope_v W_v,  slope = softcap'

Shapes: hidden rows h [S, hidden], W [V, hidden] of the same float type, targets [S]; m, l [S] and a [S, hidden] are
fp32.

The gradient is a mean of W's rows, as attention's output is one of values, so one pass over the blocks is enough: m, l
and a are of the blocks so far, and are scaled down where a block has a larger score. A block is copied while the one
before it is multiplied: 1 GiB of head takes 19 ms over the bus, its two products 12. The rows W[target] are read over
the bus by the kernel that gathers the embedding. Rejected: logits first and the gradient in a second pass, which copies
the head twice.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; cf. Wijmans et al., "Cut Your
Losses", 2024, which also goes through the vocabulary in blocks.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from finetune_kernels.ops import linear_cross_entropy
from finetune_kernels.ops.linear_cross_entropy import MAX_BLOCK, _softcap, aligned_columns, aligned_logits
from finetune_kernels.planning.block_sizes import HEAD_ROWS, VOCABULARY_BLOCK
from finetune_kernels.primitives.gather_rows import gather_rows


@triton.jit
def _add_block(  # type: ignore[no-untyped-def]
    z_ptr, target_ptr, largest_ptr, total_ptr, picked_ptr, less_ptr, first, width, stride, softcap,
    HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row a program: its scores of a block [width] become exp(z - m) slope in place; m, l and the target's score
    are updated. `first`: token id of the first score; `less`: factor of the sums before."""
    row = tl.program_id(0).to(tl.int64)
    start = z_ptr + row * stride
    columns = tl.arange(0, BLOCK_V)

    before = tl.load(largest_ptr + row)
    largest = before
    for block in range(0, width, BLOCK_V):
        offsets = block + columns
        z = _softcap(tl.load(start + offsets, mask=offsets < width, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
        largest = tl.maximum(largest, tl.max(tl.where(offsets < width, z, -float("inf")), axis=0))

    target = tl.load(target_ptr + row) - first
    if (target >= 0) & (target < width):
        tl.store(picked_ptr + row, _softcap(tl.load(start + target).to(tl.float32), softcap, HAS_SOFTCAP))

    total = 0.0
    for block in range(0, width, BLOCK_V):
        offsets = block + columns
        z = _softcap(tl.load(start + offsets, mask=offsets < width, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
        p = tl.where(offsets < width, tl.exp(z - largest), 0.0)
        total += tl.sum(p, axis=0)
        if HAS_SOFTCAP:
            p *= 1.0 - (z / softcap) * (z / softcap)
        tl.store(start + offsets, p, mask=offsets < width)

    less = tl.exp(before - largest)
    tl.store(total_ptr + row, tl.load(total_ptr + row) * less + total)
    tl.store(largest_ptr + row, largest)
    tl.store(less_ptr + row, less)


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """Returns the loss in fp32 or fp64, with all logits in memory and the head on the device of `hidden`."""
    return linear_cross_entropy.reference(hidden, weight.to(hidden.device), targets, softcap)


def stream_blocks(weight: torch.Tensor, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the first row's number and the rows of each block of `weight` [V, hidden], on `device`.

    `weight` lies in pinned memory or on the device. A block may be used until the next one is asked for.
    """
    blocks = range(0, weight.shape[0], VOCABULARY_BLOCK)
    if weight.device == device:
        for first in blocks:
            yield first, weight[first : first + VOCABULARY_BLOCK]
        return

    computing = torch.cuda.current_stream(device)
    copying: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    size = min(VOCABULARY_BLOCK, weight.shape[0])
    buffers = [torch.empty(size, weight.shape[1], dtype=weight.dtype, device=device) for _ in (0, 1)]

    copying.wait_stream(computing)  # what had the buffers' memory before may still be read
    arrived = [_copy(weight, first, buffer, copying) for first, buffer in zip(blocks, buffers, strict=False)]

    for index, first in enumerate(blocks):
        buffer = buffers[index % 2]
        computing.wait_event(arrived[index])
        yield first, buffer[: min(VOCABULARY_BLOCK, weight.shape[0] - first)]

        if index + 2 < len(blocks):
            copying.wait_event(computing.record_event())  # the block is no longer needed
            arrived.append(_copy(weight, blocks[index + 2], buffer, copying))


def _copy(weight: torch.Tensor, first: int, buffer: torch.Tensor, copying: torch.cuda.Stream) -> torch.cuda.Event:
    """Begins to copy a block on the stream `copying`; returns the event of its end."""
    rows = weight[first : first + VOCABULARY_BLOCK]
    with torch.cuda.stream(copying):
        buffer[: rows.shape[0]].copy_(rows, non_blocking=True)
        arrived: torch.cuda.Event = copying.record_event()
    return arrived


class _Sums:
    """m (`largest`), l (`total`), z[target] (`picked`) and a (`weighted`) of every row, for the blocks so far."""

    def __init__(self, hidden: torch.Tensor) -> None:
        rows, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        self.largest = torch.full((rows,), -torch.inf, dtype=torch.float32, device=hidden.device)
        self.total, self.picked, self.less = (torch.zeros_like(self.largest) for _ in range(3))
        self.weighted = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)

    def add(
        self, rows: slice, hidden: torch.Tensor, first: int, block: torch.Tensor, targets: torch.Tensor,
        softcap: float | None,
    ) -> None:  # fmt: skip
        """Adds what a block of W, from token `first` on, contributes to some rows."""
        z = aligned_logits(hidden[rows], block)  # [HEAD_ROWS, VOCABULARY_BLOCK]
        width = z.shape[1]
        _add_block[(z.shape[0],)](
            z, targets[rows], self.largest[rows], self.total[rows], self.picked[rows], self.less[rows], first, width,
            z.stride(0), softcap or 0.0, HAS_SOFTCAP=softcap is not None,
            BLOCK_V=min(MAX_BLOCK, triton.next_power_of_2(width)), num_warps=16,
        )  # fmt: skip
        self.weighted[rows].mul_(self.less[rows].unsqueeze(1)).add_(_wide_product(z, block))

    def gradient(
        self, weight: torch.Tensor, targets: torch.Tensor, like: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        """Returns dh, of the type of `like`, after the last block."""
        found = torch.empty_like(like)
        slopes = torch.ones_like(self.picked) if softcap is None else 1 - (self.picked / softcap) ** 2

        for rows in _chunks(like.shape[0]):
            mean = self.weighted[rows].div_(self.total[rows].unsqueeze(1))  # a / l
            of_target = gather_rows(weight, targets[rows]).to(mean.dtype)
            found[rows] = mean.addcmul_(of_target, slopes[rows].unsqueeze(1), value=-1)
        return found


def _wide_product(p: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Returns p [R, B] times block [B, hidden] in fp32 or fp64: sums over blocks are not rounded to 16 bits between."""
    middle = aligned_columns(block)
    if 0 < middle < block.shape[0]:
        return _wide_product(p[:, :middle], block[:middle]).add_(_wide_product(p[:, middle:], block[middle:]))
    if p.is_cuda and p.dtype.itemsize == 2:
        return torch.ops.aten.mm.dtype(p, block, torch.float32)  # type: ignore[no-any-return]
    wide = torch.promote_types(p.dtype, torch.float32)
    return p.to(wide) @ block.to(wide)


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(first, first + HEAD_ROWS) for first in range(0, rows, HEAD_ROWS))


def forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss (fp32 scalar) and the gradient of `hidden` [S, hidden] for a loss gradient of 1."""
    hidden, targets = hidden.contiguous(), targets.contiguous()
    sums = _Sums(hidden)
    for first, block in stream_blocks(weight, hidden.device):
        for rows in _chunks(hidden.shape[0]):
            sums.add(rows, hidden, first, block, targets, softcap)

    gradient = sums.gradient(weight, targets, hidden, softcap)
    return (sums.largest + sums.total.log() - sums.picked).sum(), gradient


def backward(scale: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of `hidden` for the loss gradient `scale` (scalar)."""
    return gradient * scale.to(gradient.dtype)


class BlockedCrossEntropyFunction(torch.autograd.Function):
    """Autograd around the blocks; the gradient is made in forward, as in `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        """See `blocked_cross_entropy`."""
        loss, gradient = forward(hidden, weight, targets, softcap)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Returns the gradient of `hidden`."""
        (gradient,) = ctx.saved_tensors
        return backward(scale, gradient), None, None, None


def blocked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """Sum of the rows' losses (fp32 scalar) under a frozen head in pinned host memory, or on the device.

    Shapes: hidden [S, hidden] on the GPU, weight [V, hidden], targets [S], all of them valid token ids.
    """
    return BlockedCrossEntropyFunction.apply(hidden, weight, targets, softcap)  # type: ignore[no-untyped-call, no-any-return]
