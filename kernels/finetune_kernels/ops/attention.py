"""Causal attention over packed sequences, forward and backward, by the fastest backend for their lengths.

    out[i] = softmax(scale * q[i] . k[j]) v[j]      over the j of the same sequence with i - window < j <= i

Sinks (gpt-oss) are one more key of each head, of a score of its own and a value of zero. They take a share of every
row, which its log-sum-exp tells; backward needs log-sum-exp and out alone. So no backend has to know them.

Shapes: q [T, H, D], k and v [T, H_kv, D] (grouped heads are not repeated in memory) -> out [T, H, D], all of one dtype.

On a Hopper where the package flash-attn-4 is installed, FlashAttention 4 computes everything that it takes: of lengths,
windows and heads alike it is twice as fast as the FlashAttention that PyTorch ships (4,096 tokens on an H200: 597
against 253 TFLOP/s forward, 480 and 242 backward; mixed lengths 2.0 and 1.7 times), and 3 to 10 % faster than cuDNN's
batches. Elsewhere cuDNN takes sequences of one length in passes whose shape comes again (Hopper, Blackwell), and the
FlashAttention that PyTorch ships takes all others. Only FlashAttention 4 caps scores: without it, Gemma 2 has a kernel
of ours (`softcap_attention`). What FlashAttention does not take (cards before Ampere, heads of more than 256 elements)
runs PyTorch's memory-efficient kernel.

Source: Dao, "FlashAttention-2", 2023; cuDNN's fused attention; grouped heads: Ainslie et al., "GQA", 2023.
"""

from types import ModuleType
from typing import Any

import torch

from finetune_kernels.ops import softcap_attention
from finetune_kernels.primitives.attention import batched, cpu, efficient, flash, flash4
from finetune_kernels.primitives.attention import reference as attention_reference
from finetune_kernels.primitives.attention.halves import Saved
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.precision import widen


def reference(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> torch.Tensor:
    """Returns out [T, H, D] by the formula in fp32 or fp64, rounded to the dtype of q."""
    return attention_reference.reference(Qkv(*map(widen, qkv)), sequences, params).to(qkv.q.dtype)


def forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, Saved]:
    """Returns out [T, H, D] and what `backward` needs beside qkv and out."""
    if _is_capped_here(qkv, sequences, params):
        out, lse = softcap_attention.forward(qkv, sequences, params)
        return out, (lse,)

    backend = _backend(qkv, sequences, params)
    out, saved = backend.forward(qkv, sequences, params)
    if backend in (flash, flash4, efficient):
        out, lse = params.add_sinks(out, saved[0])
        saved = (lse, *saved[1:])
    return out, saved


def backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, saved: Saved, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
    """Returns the gradients of q, k and v, shaped like them; `dout` and `out` are [T, H, D]."""
    if _is_capped_here(qkv, sequences, params):
        return softcap_attention.backward(dout, qkv, out, saved[0], sequences, params)
    found: Qkv = _backend(qkv, sequences, params).backward(dout, qkv, out, saved, sequences, params)
    return found


def _is_capped_here(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> bool:
    """True for capped scores that our own kernel computes."""
    return params.softcap is not None and not flash4.takes(qkv, sequences, params)


def _backend(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> ModuleType:
    """The kernel for this attention; the same in both directions."""
    if not qkv.q.is_cuda:
        return cpu
    if efficient.takes(qkv.q):
        return efficient
    if flash4.takes(qkv, sequences, params):
        return flash4
    return batched if batched.takes(qkv.q, sequences, params) else flash


class AttentionFunction(torch.autograd.Function):
    """Autograd around `forward` and `backward`; saves q, k, v, out and the backend's sums."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PackedSequences, params: AttentionParams
    ) -> torch.Tensor:
        """See `attention`."""
        out, saved = forward(Qkv(q, k, v), sequences, params)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.sequences, ctx.params = sequences, params
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of q, k and v."""
        q, k, v, out, *saved = ctx.saved_tensors
        gradients = backward(dout.contiguous(), Qkv(q, k, v), out, tuple(saved), ctx.sequences, ctx.params)
        return *gradients, None, None


def attention(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> torch.Tensor:
    """Attention of each sequence to itself: q [T, H, D], k and v [T, H_kv, D] -> out [T, H, D]."""
    return AttentionFunction.apply(*qkv, sequences, params)  # type: ignore[no-untyped-call, no-any-return]
