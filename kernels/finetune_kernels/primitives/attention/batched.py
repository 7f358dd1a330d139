"""cuDNN's attention of a batch: sequences of one length, by PyTorch's call.

It compiles a plan for each shape, so it serves passes whose shape has come before (`pass_counts`).

Source: NVIDIA, cuDNN's fused attention.
"""

import torch

from finetune_kernels.primitives.attention import cudnn_cards, halves
from finetune_kernels.primitives.attention.halves import Saved
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv

MAX_HEAD_SIZE = 128
aten = torch.ops.aten


def takes(q: torch.Tensor, sequences: PackedSequences, params: AttentionParams) -> bool:
    """True if the sequences are a batch whose shape comes again, on a card where cuDNN is the faster one."""
    is_cut = params.sinks is not None or params.effective_window(sequences.max_seqlen) is not None
    if is_cut or not (sequences.is_batch and sequences.comes_again):
        return False
    fits = sequences.count <= halves.MAX_SEQUENCES and q.shape[2] <= MAX_HEAD_SIZE
    return fits and cudnn_cards.is_faster(q.device)


def forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, Saved]:
    """Returns out [T, H, D] and what `backward` needs."""
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        *_batched(sequences, *qkv), None, True, 0.0, True, False, scale=params.scale
    )
    return out.transpose(1, 2).reshape(qkv.q.shape), (lse, seed, offset)


def backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, saved: Saved, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
    """Returns the gradients of q, k and v."""
    (lse, seed, offset), longest = saved, sequences.max_seqlen
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        *_batched(sequences, dout, *qkv, out), lse, seed, offset, None, None, None, longest, longest, 0.0, True,
        scale=params.scale,
    )  # fmt: skip
    return Qkv(*(g.transpose(1, 2).reshape(x.shape) for g, x in zip(gradients, qkv, strict=True)))


def _batched(sequences: PackedSequences, *parts: torch.Tensor) -> list[torch.Tensor]:
    """Returns views [N, H, L, D] of [T, H, D]."""
    return [part.view(sequences.count, sequences.max_seqlen, *part.shape[1:]).transpose(1, 2) for part in parts]
