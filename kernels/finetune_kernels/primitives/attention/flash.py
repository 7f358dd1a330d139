"""FlashAttention by cumulative lengths, as PyTorch ships it: sequences of any lengths, and windows.

Source: Dao, "FlashAttention-2", 2023.
"""

import torch

from finetune_kernels.primitives.attention import halves
from finetune_kernels.primitives.attention.halves import Saved
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv

PADDING = 128
"""Rows that backward adds to each sequence in the sums of dq."""
aten = torch.ops.aten


def forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, Saved]:
    """Returns out [T, H, D] and what `backward` needs; several calls if there are more sequences than one takes."""
    if sequences.count > halves.MAX_SEQUENCES:
        return halves.forward_in_two(forward, qkv, sequences, params)

    ends, longest = sequences.cu_seqlens, sequences.max_seqlen
    out, lse, state, unused, _ = aten._flash_attention_forward(
        *qkv, ends, ends, longest, longest, 0.0, True, False, scale=params.scale,
        **_window_options(params.effective_window(longest)),
    )  # fmt: skip
    return out, (lse, state, unused)


def backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, saved: Saved, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
    """Returns the gradients of q, k and v; several calls if one cannot count the sequences, or elements in 32 bits."""
    elements = (sequences.tokens + PADDING * sequences.count) * qkv.q[0].numel()
    if sequences.count > 1 and (sequences.count > halves.MAX_SEQUENCES or elements >= 2**31):

        def half(rows: slice, part: PackedSequences, sums: Saved) -> Qkv:
            return backward(dout[rows], qkv.select(rows), out[rows], sums, part, params)

        return halves.backward_in_two(half, saved, sequences)

    lse, *others = saved  # lse [H, T]
    ends, longest = sequences.cu_seqlens, sequences.max_seqlen
    gradients = aten._flash_attention_backward(
        dout, *qkv, out, lse, ends, ends, longest, longest, 0.0, True, *others, scale=params.scale,
        **_window_options(params.effective_window(longest)),
    )  # fmt: skip
    return Qkv(*gradients)


def _window_options(window: int | None) -> dict[str, int]:
    """FlashAttention's options for a window: the keys before and after a query's own."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
