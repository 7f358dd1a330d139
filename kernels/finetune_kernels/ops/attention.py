"""Causal attention over documents laid end to end, forward and backward, by the fastest backend for their lengths.

    out[i] = softmax(scale * q[i] . k[j], j in the same document, i - window < j <= i) v[j]

Documents of one length are a batch: cuDNN's kernel takes them (316 against 178 TFLOP/s at 2,048, 527 against 286 at
8,192, forward and backward on an H200). It compiles a plan for each shape, so it serves the first few shapes only;
everything else goes to FlashAttention by cumulative lengths, windows that some document exceeds among it. Neither
caps scores: Gemma 2 has a kernel of ours (`capped_attention`). On the CPU PyTorch's flash kernel runs document by
document. q, k and v may be strided views; grouped heads are not repeated in memory.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from finetune_kernels.ops import softcap_attention
from finetune_kernels.primitives.precision import widen

FLASH_PADDING = 128
"""Rows that FlashAttention's backward adds to each document in the sums of dq."""
CUDNN_SHAPES = 8
"""Distinct shapes that cuDNN may compile for; a training run of fixed length needs one or two."""
_seen: set[tuple[int, ...]] = set()
Saved = tuple[torch.Tensor, ...]
aten = torch.ops.aten


@dataclass(frozen=True)
class PackedSequences:
    """Where documents begin and end in T tokens."""

    boundaries: torch.Tensor
    """Cumulative lengths, int32 [N + 1] on the device."""
    longest: int
    tokens: int

    @classmethod
    def of_length(cls, length: int, count: int, device: torch.device) -> "PackedSequences":
        """`count` documents of one length."""
        ends = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
        return cls(ends, length, count * length)

    @property
    def count(self) -> int:
        """Number of documents."""
        return self.boundaries.numel() - 1

    @property
    def is_batch(self) -> bool:
        """Whether all have the same length; known without asking the device."""
        return self.count * self.longest == self.tokens


@dataclass(frozen=True)
class AttentionParams:
    """How a query scores the keys of its document."""

    scale: float
    window: int | None = None
    """Keys that a query sees, its own among them; None: all before it."""
    softcap: float | None = None
    """c in c tanh(score / c)."""

    def within(self, longest: int) -> int | None:
        """The window, where a document of `longest` tokens notices it."""
        return self.window if self.window is not None and self.window < longest else None


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedSequences, params: AttentionParams
) -> torch.Tensor:
    """The formula in fp32 or fp64, document by document: q [T, H, D], k and v [T, H_kv, D] -> out [T, H, D]."""
    groups = q.shape[1] // k.shape[1]
    outs = []
    for rows in _rows(documents):
        wide = (widen(part[rows]) for part in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
        one_q, one_k, one_v = (part.transpose(0, 1) for part in wide)
        scores = params.scale * one_q @ one_k.transpose(1, 2)  # [H, L, L]
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        at = torch.arange(scores.shape[1], device=q.device)
        back = at[:, None] - at[None, :]
        unseen = (back < 0) | (back >= (params.window or at.numel()))
        outs.append((scores.masked_fill(unseen, -torch.inf).softmax(-1) @ one_v).transpose(0, 1))
    return torch.cat(outs).to(q.dtype)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedSequences, params: AttentionParams
) -> tuple[torch.Tensor, Saved]:
    """q [T, H, D], k and v [T, H_kv, D] -> out [T, H, D] and what `backward` needs beside them."""
    window, scale = params.within(documents.longest), params.scale
    if params.softcap is not None:
        ends, longest = documents.boundaries, documents.longest
        out, lse = softcap_attention.forward(q, k, v, ends, longest, scale, params.softcap, window)
        return out, (lse,)
    if not q.is_cuda:
        return _cpu_forward(q, k, v, documents, scale, window)
    if _takes_cudnn(q, documents, window):
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            *_batched(documents, q, k, v), None, True, 0.0, True, False, scale=scale
        )
        return out.transpose(1, 2).reshape(q.shape), (lse, seed, offset)
    ends, longest = documents.boundaries, documents.longest
    out, lse, state, unused, _ = aten._flash_attention_forward(
        q, k, v, ends, ends, longest, longest, 0.0, True, False, scale=scale, **_left(window)
    )
    return out, (lse, state, unused)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: Saved,
    documents: PackedSequences,
    params: AttentionParams,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, shaped like them; `dout` and `out` [T, H, D]."""
    window, scale = params.within(documents.longest), params.scale
    if params.softcap is not None:
        return softcap_attention.backward(
            dout, q, k, v, out, saved[0], documents.boundaries, documents.longest, scale, params.softcap, window
        )
    if not q.is_cuda:
        return _cpu_backward(dout, q, k, v, out, saved, documents, scale, window)
    if _takes_cudnn(q, documents, window):
        lse, seed, offset = saved
        length = documents.longest
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *_batched(documents, dout, q, k, v, out), lse, seed, offset, None, None, None, length, length, 0.0, True,
            scale=scale,
        )  # fmt: skip
        dq, dk, dv = (g.transpose(1, 2).reshape(x.shape) for g, x in zip(gradients, (q, k, v), strict=True))
        return dq, dk, dv
    if (documents.tokens + FLASH_PADDING * documents.count) * q[0].numel() >= 2**31 and documents.count > 1:
        return _backward_in_halves(dout, q, k, v, out, saved, documents, params)
    lse, state, unused = saved
    ends, longest = documents.boundaries, documents.longest
    dq, dk, dv = aten._flash_attention_backward(
        dout, q, k, v, out, lse, ends, ends, longest, longest, 0.0, True, state, unused, scale=scale, **_left(window)
    )
    return dq, dk, dv


def _backward_in_halves(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: Saved,
    documents: PackedSequences,
    params: AttentionParams,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first documents and the last, each alone: FlashAttention's backward counts elements in 32 bits."""
    lse, *others = saved  # sums [H, T]
    middle = documents.count // 2
    cut = int(documents.boundaries[middle])
    halves = (
        (slice(0, cut), documents.boundaries[: middle + 1]),
        (slice(cut, None), documents.boundaries[middle:] - cut),
    )
    found = [
        backward(
            dout[rows], q[rows], k[rows], v[rows], out[rows], (lse[:, rows].contiguous(), *others),
            PackedSequences(ends, documents.longest, int(ends[-1])), params,
        )
        for rows, ends in halves
    ]  # fmt: skip
    dq, dk, dv = (torch.cat(parts) for parts in zip(*found, strict=True))
    return dq, dk, dv


def _left(window: int | None) -> dict[str, int]:
    """FlashAttention's window: keys before and after a query's own."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _takes_cudnn(q: torch.Tensor, documents: PackedSequences, window: int | None) -> bool:
    if not documents.is_batch or q.shape[2] > 128 or window is not None:
        return False
    shape = (documents.count, documents.longest, *q.shape[1:])
    if shape not in _seen and len(_seen) < CUDNN_SHAPES:
        _seen.add(shape)
    return shape in _seen


def _batched(documents: PackedSequences, *parts: torch.Tensor) -> list[torch.Tensor]:
    """[T, H, D] -> [N, H, L, D], views."""
    return [part.view(documents.count, documents.longest, *part.shape[1:]).transpose(1, 2) for part in parts]


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedSequences, scale: float, window: int | None
) -> tuple[torch.Tensor, Saved]:
    groups = q.shape[1] // k.shape[1]
    outs, sums = [], []
    for rows in _rows(documents):
        parts = (_single(q[rows]), _single(k[rows], groups), _single(v[rows], groups))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, 0.0, window is None, attn_mask=_mask(window, q[rows]), scale=scale
        )
        outs.append(out[0].transpose(0, 1))
        sums.append(lse)
    return torch.cat(outs), tuple(sums)


def _cpu_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: Saved,
    documents: PackedSequences,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = q.shape[1] // k.shape[1]
    found: list[list[torch.Tensor]] = [[], [], []]
    for rows, lse in zip(_rows(documents), saved, strict=True):
        parts = (_single(dout[rows]), _single(q[rows]), _single(k[rows], groups), _single(v[rows], groups))
        three = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, _single(out[rows]), lse, 0.0, window is None, attn_mask=_mask(window, q[rows]), scale=scale
        )
        for gradients, one in zip(found, three, strict=True):
            gradients.append(one[0].transpose(0, 1))
    dq, dk, dv = (torch.cat(gradients) for gradients in found)
    shape = (k.shape[0], k.shape[1], groups, k.shape[2])
    return dq, dk.reshape(shape).sum(2), dv.reshape(shape).sum(2)


def _mask(window: int | None, rows: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores of one document [L, L]: nothing inside the window, -inf outside; None without."""
    if window is None:
        return None
    at = torch.arange(rows.shape[0], device=rows.device)
    back = at[:, None] - at[None, :]
    outside = (back < 0) | (back >= window)
    return torch.zeros(outside.shape, dtype=rows.dtype, device=rows.device).masked_fill_(outside, -torch.inf)


def _rows(documents: PackedSequences) -> list[slice]:
    ends = documents.boundaries.tolist()
    return [slice(first, last) for first, last in pairwise(ends)]


def _single(part: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """[L, H, D] -> [1, H * groups, L, D]."""
    return part.repeat_interleave(groups, dim=1).transpose(0, 1).unsqueeze(0)
