"""The CPU's flash kernel, one sequence after the other."""

import torch

from finetune_kernels.primitives.attention.halves import Saved
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv, sum_groups

aten = torch.ops.aten


def forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, Saved]:
    """Returns out [T, H, D] and the softmax sums of each sequence."""
    window = params.effective_window(sequences.max_seqlen)
    outs, sums = [], []
    for rows in sequences.slices():
        one = qkv.select(rows)
        parts = (_single(one.q), _single(one.k, qkv.groups), _single(one.v, qkv.groups))  # [1, H, L, D]
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, 0.0, window is None, attn_mask=_additive_mask(window, one.q), scale=params.scale
        )
        own, whole = params.add_sinks(out[0].transpose(0, 1), lse[0])  # [L, H, D], [H, L]
        outs.append(own)
        sums.append(whole.unsqueeze(0))

    return torch.cat(outs), tuple(sums)


def backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, saved: Saved, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
    """Returns the gradients of q, k and v."""
    window, groups = params.effective_window(sequences.max_seqlen), qkv.groups
    found: list[list[torch.Tensor]] = [[], [], []]
    for rows, lse in zip(sequences.slices(), saved, strict=True):
        one = qkv.select(rows)
        parts = (_single(dout[rows]), _single(one.q), _single(one.k, groups), _single(one.v, groups))
        three = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, _single(out[rows]), lse, 0.0, window is None, attn_mask=_additive_mask(window, one.q),
            scale=params.scale,
        )  # fmt: skip
        for gradients, gradient in zip(found, three, strict=True):
            gradients.append(gradient[0].transpose(0, 1))

    dq, dk, dv = (torch.cat(gradients) for gradients in found)
    return Qkv(dq, sum_groups(dk, groups), sum_groups(dv, groups))


def _additive_mask(window: int | None, rows: torch.Tensor) -> torch.Tensor | None:
    """Returns what is added to one sequence's scores [L, L]: 0 in the window, -inf outside; None without a window."""
    if window is None:
        return None
    position = torch.arange(rows.shape[0], device=rows.device)
    distance = position[:, None] - position[None, :]
    unseen = (distance < 0) | (distance >= window)
    return torch.zeros(unseen.shape, dtype=rows.dtype, device=rows.device).masked_fill_(unseen, -torch.inf)


def _single(part: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Returns one sequence [L, H, D] as a batch [1, H * groups, L, D]."""
    return part.repeat_interleave(groups, dim=1).transpose(0, 1).unsqueeze(0)
