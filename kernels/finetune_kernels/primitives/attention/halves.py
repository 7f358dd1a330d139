"""Attention in two calls, each of half of the sequences, where one call cannot count them or their elements."""

from collections.abc import Callable

import torch

from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv

MAX_SEQUENCES = 65_535
"""Sequences of one call: they are on an axis of the kernels' grid that CUDA lets be no longer."""
Saved = tuple[torch.Tensor, ...]
"""What a backend's backward needs beside q, k, v and out: log-sum-exp first, then its random state."""
Forward = Callable[[Qkv, PackedSequences, AttentionParams], tuple[torch.Tensor, Saved]]
HalfBackward = Callable[[slice, PackedSequences, Saved], Qkv]


def forward_in_two(
    attend: Forward, qkv: Qkv, sequences: PackedSequences, params: AttentionParams
) -> tuple[torch.Tensor, Saved]:
    """`attend` in two calls, each of half of the sequences."""
    found = [attend(qkv.select(rows), part, params) for rows, part in sequences.halves()]
    outs, saved = zip(*found, strict=True)
    lse = torch.cat([one[0] for one in saved], dim=1)  # [H, T]
    return torch.cat(outs), (lse, *saved[0][1:])  # random states are those of dropout, which there is none of


def backward_in_two(attend: HalfBackward, saved: Saved, sequences: PackedSequences) -> Qkv:
    """The same for a backward pass; `attend` takes the rows of a half, its sequences and what was saved of them."""
    lse, *others = saved  # lse [H, T]
    found = [attend(rows, part, (lse[:, rows].contiguous(), *others)) for rows, part in sequences.halves()]
    return Qkv(*(torch.cat(gradients) for gradients in zip(*found, strict=True)))
