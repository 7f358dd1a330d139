"""The attention half of a decoder layer: norm, merged q k v, rotation, attention, projection, and Gemma's second norm.

q, k, v = rotate(norm(x) Wqkv),   a = attention(q, k, v) Wo,   added = a, or norm(a) where the family has that norm
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from finetune_kernels.layers.adapters import LoraPass
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.ops import attention, rms_norm
from finetune_kernels.ops.attention import AttentionParams, PackedSequences
from finetune_kernels.ops.rotary_embedding import HeadNorm, Heads, rotate, rotate_back
from finetune_kernels.primitives.adapter_dropout import DropoutSeed


class Norm(NamedTuple):
    """A frozen root mean square norm; `weight` [hidden] is what rows are multiplied by (Gemma's one is added)."""

    weight: torch.Tensor
    eps: float


class CosSin(NamedTuple):
    """cos and sin of every token's rotation, [T, R] each."""

    cos: torch.Tensor
    sin: torch.Tensor


NormActivations = tuple[torch.Tensor, ...]
"""A norm's input and its scales where the norm exists; nothing otherwise."""


class AttentionPass(NamedTuple):
    """What one pass is made with."""

    qkv: LoraPass
    o: LoraPass


class AttentionActivations(NamedTuple):
    """What backward needs of the forward pass beside its input."""

    r1: torch.Tensor
    qkv: torch.Tensor
    """Rotated in place, or before its head norm where there is one."""
    xa_qkv: torch.Tensor
    out: torch.Tensor
    xa_o: torch.Tensor
    post: NormActivations
    saved: attention.Saved

    def flat(self) -> list[torch.Tensor]:
        """All tensors, for `unflatten`."""
        return [*self[:5], *self.post, *self.saved]

    @classmethod
    def unflatten(cls, tensors: list[torch.Tensor], *, post: bool) -> "AttentionActivations":
        """The other way round; `post`: whether there is a second norm."""
        end = 7 if post else 5
        return cls(*tensors[:5], tuple(tensors[5:end]), tuple(tensors[end:]))  # type: ignore[call-arg, arg-type]


def normalize(norm: Norm | None, rows: torch.Tensor) -> tuple[torch.Tensor, NormActivations]:
    """norm(rows) and what its backward needs; the rows themselves where there is no norm."""
    if norm is None:
        return rows, ()
    _, y, scales = rms_norm.forward(rows, norm.weight, norm.eps)
    return y, (rows, scales)


def normalize_back(norm: Norm | None, dy: torch.Tensor, kept: NormActivations) -> torch.Tensor:
    """Gradient of `normalize`'s rows."""
    return dy if norm is None else rms_norm.backward(dy, kept[0], norm.weight, kept[1])[0]


@dataclass
class AttentionBlock:
    """Weights and settings; only the adapters train."""

    norm: Norm
    qkv: LinearGroup
    o: LinearGroup
    post_norm: Norm | None
    heads: Heads
    head_norm: HeadNorm | None
    params: AttentionParams

    def begin(self, seed: DropoutSeed | None) -> AttentionPass:
        """A pass with the masks of `seed`."""
        return AttentionPass(self.qkv.begin(seed), self.o.begin(seed))

    def forward(
        self, x: torch.Tensor, cos_sin: CosSin, documents: PackedSequences, pass_ctx: AttentionPass
    ) -> tuple[AttentionActivations, torch.Tensor]:
        """x [T, hidden] -> what is kept, and what is to be added to x."""
        _, n1, r1 = rms_norm.forward(x, self.norm.weight, self.norm.eps)
        qkv, xa_qkv = self.qkv.forward(n1, pass_ctx.qkv)
        q, k, v = self.heads.split(rotate(qkv, *cos_sin, self.heads, self.head_norm))
        out, saved = attention.forward(q, k, v, documents, self.params)
        a, xa_o = self.o.forward(out.flatten(1), pass_ctx.o)
        added, post = normalize(self.post_norm, a)
        return AttentionActivations(r1, qkv, xa_qkv, out, xa_o, post, saved), added

    def backward(
        self, dh: torch.Tensor, x: torch.Tensor, cos_sin: CosSin, documents: PackedSequences,
        attended: AttentionActivations, pass_ctx: AttentionPass, *, wants_dx: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
        """dh [T, hidden], the gradient of x + added -> that of x (both ways) and of the adapters, q k v first."""
        da = normalize_back(self.post_norm, dh, attended.post)
        d_out, d_xa = self.o.backward(da, pass_ctx.o)
        of_o = self.o.gradients(da, attended.out.flatten(1), attended.xa_o, d_xa, pass_ctx.o)
        d_qkv = self._rotated_back(d_out, cos_sin, documents, attended)
        if wants_dx:
            dn1, d_xa = self.qkv.backward(d_qkv, pass_ctx.qkv)
            dx, n1 = rms_norm.backward(dn1, x, self.norm.weight, attended.r1, residual=dh, return_y=True)
        else:
            dx, d_xa = None, self.qkv.d_xa(d_qkv, pass_ctx.qkv)
            _, n1, _ = rms_norm.forward(x, self.norm.weight, self.norm.eps)
        return dx, [*self.qkv.gradients(d_qkv, n1, attended.xa_qkv, d_xa, pass_ctx.qkv), *of_o]

    def _rotated_back(
        self, d_out: torch.Tensor, cos_sin: CosSin, documents: PackedSequences, attended: AttentionActivations
    ) -> torch.Tensor:
        """Gradient of the merged projection, from that of attention's output."""
        rotated = attended.qkv
        if self.head_norm is not None:
            rotated = rotate(attended.qkv, *cos_sin, self.heads, self.head_norm)
        three = attention.backward(
            d_out.view_as(attended.out), *self.heads.split(rotated), attended.out, attended.saved, documents,
            self.params,
        )  # fmt: skip
        return rotate_back(three, attended.qkv, *cos_sin, self.heads, self.head_norm)
