"""PyTorch's memory-efficient kernel: cards before Ampere, and heads that are larger than FlashAttention's.

It takes heads of any size: of more than 256 elements (Gemma 4's full layers have 512) it keeps the sum of the output in
memory.
"""

import torch

from finetune_kernels.planning.block_sizes import FLASH_HEAD_SIZE
from finetune_kernels.primitives.attention import halves
from finetune_kernels.primitives.attention.halves import Saved
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv, sum_groups
from finetune_kernels.primitives.precision import before_ampere

CAUSAL = 1
"""The kernel's number of a mask in which a query sees the keys up to its own."""
SUMS_BLOCK = 32
"""Rows to a multiple of which it pads the softmax sums of a sequence."""
aten = torch.ops.aten


def takes(q: torch.Tensor) -> bool:
    """True for cards and heads that FlashAttention does not take."""
    return before_ampere(q) or q.shape[2] > FLASH_HEAD_SIZE


def forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, Saved]:
    """Returns out [T, H, D] and what `backward` needs."""
    if sequences.count > halves.MAX_SEQUENCES:
        return halves.forward_in_two(forward, qkv, sequences, params)

    ends, longest = sequences.cu_seqlens, sequences.max_seqlen
    out, sums, seed, offset, _, _ = aten._efficient_attention_forward(
        *qkv.repeated(), None, ends, ends, longest, longest, 0.0, CAUSAL, True, scale=params.scale,
        **_window_options(params.effective_window(longest)),
    )  # fmt: skip
    # The sums are [N, H, longest sequence]: of a pack with one long sequence that is far more than one for each row.
    number, place = sequences.places()
    return out[0], (sums[number, :, place].T.contiguous(), seed, offset)


def backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, saved: Saved, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
    """Returns the gradients of q, k and v."""
    if sequences.count > halves.MAX_SEQUENCES:

        def half(rows: slice, part: PackedSequences, sums: Saved) -> Qkv:
            return backward(dout[rows], qkv.select(rows), out[rows], sums, part, params)

        return halves.backward_in_two(half, saved, sequences)

    lse, seed, offset = saved  # lse [H, T]
    ends, longest, heads = sequences.cu_seqlens, sequences.max_seqlen, qkv.q.shape[1]
    padded = -(-longest // SUMS_BLOCK) * SUMS_BLOCK
    sums = lse.new_full((sequences.count, heads, padded), torch.inf)  # as the kernel itself pads
    number, place = sequences.places()
    sums[number, :, place] = lse.T

    dq, dk, dv, _ = aten._efficient_attention_backward(
        dout.unsqueeze(0), *qkv.repeated(), None, out.unsqueeze(0), ends, ends, longest, longest, sums, 0.0, seed,
        offset, CAUSAL, False, scale=params.scale, **_window_options(params.effective_window(longest)),
    )  # fmt: skip
    return Qkv(dq[0], *(sum_groups(part[0], qkv.groups) for part in (dk, dv)))


def _window_options(window: int | None) -> dict[str, int]:
    """The kernel's option for a window."""
    return {} if window is None else {"window_size": window}
