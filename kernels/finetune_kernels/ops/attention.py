"""Causal attention over packed sequences, forward and backward, by the fastest backend for their lengths.

    out[i] = softmax(scale * q[i] . k[j]) v[j]      over the j of the same sequence with i - window < j <= i

Sinks (gpt-oss) are one more key of each head, of a score of its own and a value of zero. They take a share of every
row, which its log-sum-exp tells; backward needs log-sum-exp and out alone. So no backend has to know them.

Shapes: q [T, H, D], k and v [T, H_kv, D] (grouped heads are not repeated in memory) -> out [T, H, D], all of one dtype.

Sequences of one length are a batch: cuDNN's kernel takes them (316 against 178 TFLOP/s at 2,048, 527 against 286 at
8,192, forward and backward on an H200). It compiles a plan for each shape, so it serves the first few shapes only.
Everything else goes to FlashAttention by cumulative lengths, including windows shorter than a sequence. Neither of them
caps scores: Gemma 2 has a kernel of ours (`softcap_attention`). Cards before Ampere run PyTorch's memory-efficient
kernel, and so do heads of more than 256 elements on every card (Gemma 4's full layers have 512): FlashAttention and
cuDNN take no larger ones. The CPU's flash kernel takes the sequences one by one.

Source: Dao, "FlashAttention-2", 2023 (the kernel that PyTorch ships); cuDNN's fused attention; grouped heads: Ainslie
et al., "GQA", 2023.
"""

from collections.abc import Callable
from typing import Any

import torch

from finetune_kernels.ops import softcap_attention
from finetune_kernels.planning.block_sizes import FLASH_HEAD_SIZE
from finetune_kernels.primitives import attention_reference
from finetune_kernels.primitives.attention_inputs import AttentionParams, PackedSequences, Qkv, sum_groups
from finetune_kernels.primitives.precision import before_ampere, widen

FLASH_PADDING = 128
"""Rows that FlashAttention's backward adds to each sequence in the sums of dq."""
MAX_SEQUENCES = 65_535
"""Sequences of one call: they are on an axis of the kernels' grid that CUDA lets be no longer."""
CAUSAL = 1
"""The memory-efficient kernel's number of a mask in which a query sees the keys up to its own."""
SUMS_BLOCK = 32
"""Rows to a multiple of which that kernel pads the softmax sums of a sequence."""
MAX_CUDNN_SHAPES = 8
"""Distinct shapes that cuDNN may compile for; a training run of fixed length needs one or two."""
_cudnn_shapes: set[tuple[int, ...]] = set()
Saved = tuple[torch.Tensor, ...]
"""What a backend's backward needs beside q, k, v and out: log-sum-exp first, then its random state."""
Forward = Callable[[Qkv, PackedSequences, AttentionParams], tuple[torch.Tensor, Saved]]
HalfBackward = Callable[[slice, PackedSequences, Saved], Qkv]
aten = torch.ops.aten


def reference(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> torch.Tensor:
    """Returns out [T, H, D] by the formula in fp32 or fp64, rounded to the dtype of q."""
    return attention_reference.reference(Qkv(*map(widen, qkv)), sequences, params).to(qkv.q.dtype)


def forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, Saved]:
    """Returns out [T, H, D] and what `backward` needs beside qkv and out."""
    if params.softcap is not None:
        out, lse = softcap_attention.forward(qkv, sequences, params)
        return out, (lse,)
    if not qkv.q.is_cuda:
        return _cpu_forward(qkv, sequences, params)

    is_efficient = _takes_efficient(qkv.q)
    if not is_efficient and _takes_cudnn(qkv.q, sequences, params):
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            *_batched(sequences, *qkv), None, True, 0.0, True, False, scale=params.scale
        )
        return out.transpose(1, 2).reshape(qkv.q.shape), (lse, seed, offset)

    by_lengths = _efficient_forward if is_efficient else _flash_forward
    out, (lse, *others) = by_lengths(qkv, sequences, params)
    out, lse = params.add_sinks(out, lse)
    return out, (lse, *others)


def backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, saved: Saved, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
    """Returns the gradients of q, k and v, shaped like them; `dout` and `out` are [T, H, D]."""
    if params.softcap is not None:
        return softcap_attention.backward(dout, qkv, out, saved[0], sequences, params)
    if not qkv.q.is_cuda:
        return _cpu_backward(dout, qkv, out, saved, sequences, params)

    if _takes_efficient(qkv.q):
        return _efficient_backward(dout, qkv, out, saved, sequences, params)

    longest = sequences.max_seqlen
    if _takes_cudnn(qkv.q, sequences, params):
        lse, seed, offset = saved
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *_batched(sequences, dout, *qkv, out), lse, seed, offset, None, None, None, longest, longest, 0.0, True,
            scale=params.scale,
        )  # fmt: skip
        return Qkv(*(g.transpose(1, 2).reshape(x.shape) for g, x in zip(gradients, qkv, strict=True)))

    return _flash_backward(dout, qkv, out, saved, sequences, params)


def _flash_forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, Saved]:
    """`forward` by FlashAttention, in several calls if there are more sequences than one call takes."""
    if sequences.count > MAX_SEQUENCES:
        return _forward_in_two(_flash_forward, qkv, sequences, params)

    ends, longest = sequences.cu_seqlens, sequences.max_seqlen
    out, lse, state, unused, _ = aten._flash_attention_forward(
        *qkv, ends, ends, longest, longest, 0.0, True, False, scale=params.scale,
        **_flash_window(params.effective_window(longest)),
    )  # fmt: skip
    return out, (lse, state, unused)


def _flash_backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, saved: Saved, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
    """`backward` by FlashAttention; in several calls if one cannot count the sequences, or elements in 32 bits."""
    elements = (sequences.tokens + FLASH_PADDING * sequences.count) * qkv.q[0].numel()
    if sequences.count > 1 and (sequences.count > MAX_SEQUENCES or elements >= 2**31):

        def half(rows: slice, part: PackedSequences, sums: Saved) -> Qkv:
            return _flash_backward(dout[rows], qkv.select(rows), out[rows], sums, part, params)

        return _backward_in_two(half, saved, sequences)

    lse, *others = saved  # lse [H, T]
    ends, longest = sequences.cu_seqlens, sequences.max_seqlen
    gradients = aten._flash_attention_backward(
        dout, *qkv, out, lse, ends, ends, longest, longest, 0.0, True, *others, scale=params.scale,
        **_flash_window(params.effective_window(longest)),
    )  # fmt: skip
    return Qkv(*gradients)


def _forward_in_two(
    attend: Forward, qkv: Qkv, sequences: PackedSequences, params: AttentionParams
) -> tuple[torch.Tensor, Saved]:
    """`attend` in two calls, each of half of the sequences."""
    found = [attend(qkv.select(rows), part, params) for rows, part in sequences.halves()]
    outs, saved = zip(*found, strict=True)
    lse = torch.cat([one[0] for one in saved], dim=1)  # [H, T]
    return torch.cat(outs), (lse, *saved[0][1:])  # random states are those of dropout, which there is none of


def _backward_in_two(attend: HalfBackward, saved: Saved, sequences: PackedSequences) -> Qkv:
    """The same for a backward pass; `attend` takes the rows of a half, its sequences and what was saved of them."""
    lse, *others = saved  # lse [H, T]
    found = [attend(rows, part, (lse[:, rows].contiguous(), *others)) for rows, part in sequences.halves()]
    return Qkv(*(torch.cat(gradients) for gradients in zip(*found, strict=True)))


def _efficient_forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, Saved]:
    """`forward` by the memory-efficient kernel."""
    if sequences.count > MAX_SEQUENCES:
        return _forward_in_two(_efficient_forward, qkv, sequences, params)

    ends, longest = sequences.cu_seqlens, sequences.max_seqlen
    out, sums, seed, offset, _, _ = aten._efficient_attention_forward(
        *qkv.repeated(), None, ends, ends, longest, longest, 0.0, CAUSAL, True, scale=params.scale,
        **_efficient_window(params.effective_window(longest)),
    )  # fmt: skip
    # The sums are [N, H, longest sequence]: of a pack with one long sequence that is far more than one for each row.
    number, place = sequences.places()
    return out[0], (sums[number, :, place].T.contiguous(), seed, offset)


def _efficient_backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, saved: Saved, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
    """`backward` by the memory-efficient kernel."""
    if sequences.count > MAX_SEQUENCES:

        def half(rows: slice, part: PackedSequences, sums: Saved) -> Qkv:
            return _efficient_backward(dout[rows], qkv.select(rows), out[rows], sums, part, params)

        return _backward_in_two(half, saved, sequences)

    lse, seed, offset = saved  # lse [H, T]
    ends, longest, heads = sequences.cu_seqlens, sequences.max_seqlen, qkv.q.shape[1]
    padded = -(-longest // SUMS_BLOCK) * SUMS_BLOCK
    sums = lse.new_full((sequences.count, heads, padded), torch.inf)  # as the kernel itself pads
    number, place = sequences.places()
    sums[number, :, place] = lse.T

    dq, dk, dv, _ = aten._efficient_attention_backward(
        dout.unsqueeze(0), *qkv.repeated(), None, out.unsqueeze(0), ends, ends, longest, longest, sums, 0.0, seed,
        offset, CAUSAL, False, scale=params.scale, **_efficient_window(params.effective_window(longest)),
    )  # fmt: skip
    return Qkv(dq[0], *(sum_groups(part[0], qkv.groups) for part in (dk, dv)))


def _efficient_window(window: int | None) -> dict[str, int]:
    """The memory-efficient kernel's option for a window."""
    return {} if window is None else {"window_size": window}


def _flash_window(window: int | None) -> dict[str, int]:
    """FlashAttention's options for a window: the keys before and after a query's own."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _takes_efficient(q: torch.Tensor) -> bool:
    """True for cards and heads that FlashAttention does not take."""
    return before_ampere(q) or q.shape[2] > FLASH_HEAD_SIZE


def _takes_cudnn(q: torch.Tensor, sequences: PackedSequences, params: AttentionParams) -> bool:
    is_cut = params.sinks is not None or params.effective_window(sequences.max_seqlen) is not None
    if is_cut or not sequences.is_batch or sequences.count > MAX_SEQUENCES or q.shape[2] > 128:
        return False

    shape = (sequences.count, sequences.max_seqlen, *q.shape[1:])
    if shape not in _cudnn_shapes and len(_cudnn_shapes) < MAX_CUDNN_SHAPES:
        _cudnn_shapes.add(shape)
    return shape in _cudnn_shapes


def _batched(sequences: PackedSequences, *parts: torch.Tensor) -> list[torch.Tensor]:
    """Returns views [N, H, L, D] of [T, H, D]."""
    return [part.view(sequences.count, sequences.max_seqlen, *part.shape[1:]).transpose(1, 2) for part in parts]


def _cpu_forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, Saved]:
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


def _cpu_backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, saved: Saved, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
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
