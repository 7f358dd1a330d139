"""Inputs of attention: q, k and v, the packed sequences that they come from, and how scores are computed."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch


class Qkv(NamedTuple):
    """q [T, H, D], k and v [T, H_kv, D], or their gradients; each may be a strided view of a merged projection."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def groups(self) -> int:
        """Query heads per key-value head."""
        return self.q.shape[1] // self.k.shape[1]

    def select(self, rows: slice) -> "Qkv":
        """Returns views of some rows."""
        return Qkv(self.q[rows], self.k[rows], self.v[rows])

    def repeated(self) -> list[torch.Tensor]:
        """Returns q, k and v as a batch of one [1, T, H, D], k and v for each query head."""
        parts = (self.q, *(part.repeat_interleave(self.groups, dim=1) for part in (self.k, self.v)))
        return [part.unsqueeze(0) for part in parts]


@dataclass(frozen=True)
class PackedSequences:
    """N sequences laid end to end in T rows, without padding; attention does not cross from one to another."""

    cu_seqlens: torch.Tensor
    """Cumulative lengths, int32 [N + 1] on the device: sequence i has the rows cu_seqlens[i] to cu_seqlens[i + 1]."""
    max_seqlen: int
    tokens: int
    """T."""
    is_bounded: bool = False
    """True if max_seqlen is a bound, which sequences need not reach."""
    comes_again: bool = False
    """True if passes of this shape have come before, so that a kernel that is compiled for one shape pays
    (`pass_counts`). All layers of a pass, and both directions of each, are told the same."""

    @classmethod
    def of_length(cls, length: int, count: int, device: torch.device) -> "PackedSequences":
        """Returns `count` sequences of one length."""
        cu_seqlens = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
        return cls(cu_seqlens, length, count * length)

    @property
    def count(self) -> int:
        """Number of sequences, N."""
        return self.cu_seqlens.numel() - 1

    @property
    def is_batch(self) -> bool:
        """True if all sequences have the same length; known on the host, without waiting for the device."""
        return not self.is_bounded and self.count * self.max_seqlen == self.tokens

    def halves(self) -> list[tuple[slice, "PackedSequences"]]:
        """Returns the first and the last sequences, each with their rows; waits for the device."""
        middle = self.count // 2
        cut = int(self.cu_seqlens[middle])  # the row where the last ones begin
        first = PackedSequences(self.cu_seqlens[: middle + 1], self.max_seqlen, cut, self.is_bounded)
        last = PackedSequences(self.cu_seqlens[middle:] - cut, self.max_seqlen, self.tokens - cut, self.is_bounded)
        return [(slice(0, cut), first), (slice(cut, None), last)]

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each row's sequence and its place in it, int64 [T] each."""
        rows = torch.arange(self.tokens, device=self.cu_seqlens.device)
        number = torch.bucketize(rows, self.cu_seqlens[1:], right=True)
        return number, rows - self.cu_seqlens[number]

    def slices(self) -> list[slice]:
        """Returns the rows of each sequence that is not empty; waits for the device."""
        return [slice(first, last) for first, last in pairwise(self.cu_seqlens.tolist()) if first < last]


@dataclass(frozen=True)
class AttentionParams:
    """Settings of the scores of queries and keys, and of which keys a query sees."""

    scale: float
    """Factor of q . k, usually 1 / sqrt(D)."""
    window: int | None = None
    """Keys that a query sees, its own included; None: all keys up to its own."""
    softcap: float | None = None
    """c in c tanh(score / c); None: scores are not capped."""
    sinks: torch.Tensor | None = None
    """A score for each query head [H], frozen, of a key that every query sees and whose value is zero (gpt-oss)."""

    def effective_window(self, max_seqlen: int) -> int | None:
        """Returns the window, or None if no sequence is longer than it."""
        return self.window if self.window is not None and self.window < max_seqlen else None

    def add_sinks(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """out [T, H, D] and log-sum-exp [H, T] of the keys -> those with the sinks among them, if there are any."""
        if self.sinks is None:
            return out, lse
        whole = torch.logaddexp(lse, self.sinks.to(lse.dtype)[:, None])
        share = torch.exp(lse - whole).T.unsqueeze(-1)  # [T, H, 1]
        return (out * share).to(out.dtype), whole


def sum_groups(gradient: torch.Tensor, groups: int) -> torch.Tensor:
    """Gradient of k or v repeated for each query head of a group [T, H, D] -> that of k or v [T, H_kv, D]."""
    rows, heads, size = gradient.shape
    return gradient.reshape(rows, heads // groups, groups, size).sum(2)
