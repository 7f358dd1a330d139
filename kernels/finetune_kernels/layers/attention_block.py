"""The attention block of a decoder layer: norm, merged q k v, RoPE, attention, projection, and Gemma's second norm.

q, k, v = rope(norm(x) Wqkv),   a = attention(q, k, v) Wo,   out = a, or norm(a) if the family has that norm
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.lora_pass import LoraPass
from finetune_kernels.ops import attention, rms_norm, rotary_embedding
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.ops.rotary_embedding import HeadNorm, Heads
from finetune_kernels.primitives.adapter_dropout import DropoutSeed
from finetune_kernels.primitives.attention_inputs import AttentionParams, PackedSequences


class CosSin(NamedTuple):
    """RoPE's cos and sin for every token, [T, R] each."""

    cos: torch.Tensor
    sin: torch.Tensor


class LayerInputs(NamedTuple):
    """The input of a layer: its rows, and what all layers of a pass share."""

    x: torch.Tensor
    """[T, hidden]"""
    cos_sin: CosSin
    sequences: PackedSequences


NormActivations = tuple[torch.Tensor, ...]
"""A norm's input [T, hidden] and rstd [T]; empty if there is no norm."""


class AttentionPass(NamedTuple):
    """The passes through the block's two groups of linear layers."""

    qkv: LoraPass
    o: LoraPass


class AttentionActivations(NamedTuple):
    """Tensors that the block's backward needs beside its input."""

    rstd: torch.Tensor
    """1 / root mean square of x [T]."""
    qkv: torch.Tensor
    """q, k, v [T, (H + 2 H_kv) D] after RoPE; for models with q/k norm, from before norm and RoPE."""
    xa_qkv: torch.Tensor
    out: torch.Tensor
    """Attention's output [T, H, D]."""
    xa_o: torch.Tensor
    post_norm: NormActivations
    softmax: attention.Saved
    """What attention saved for its own backward: the softmax sums and, for some backends, random state."""

    def flat(self) -> list[torch.Tensor]:
        """All tensors, in the order that `unflatten` takes."""
        return [*self[:5], *self.post_norm, *self.softmax]

    @classmethod
    def unflatten(cls, tensors: list[torch.Tensor], *, post_norm: bool) -> "AttentionActivations":
        """The inverse of `flat`; `post_norm`: the block has a second norm."""
        end = 7 if post_norm else 5
        return cls(*tensors[:5], tuple(tensors[5:end]), tuple(tensors[end:]))  # type: ignore[call-arg, arg-type]


def normalize(norm: Norm | None, rows: torch.Tensor) -> tuple[torch.Tensor, NormActivations]:
    """Returns norm(rows) [T, hidden] and what its backward needs; the rows themselves if there is no norm."""
    if norm is None:
        return rows, ()
    _, y, rstd = rms_norm.forward(rows, norm)
    return y, (rows, rstd)


def normalize_backward(norm: Norm | None, dy: torch.Tensor, saved: NormActivations) -> torch.Tensor:
    """Gradient of `normalize`'s rows [T, hidden]."""
    return dy if norm is None else rms_norm.backward(dy, saved[0], norm, saved[1])[0]


@dataclass
class AttentionBlock:
    """Weights and settings of the block; only the adapters train."""

    norm: Norm
    qkv: LinearGroup
    o: LinearGroup
    post_norm: Norm | None
    heads: Heads
    head_norm: HeadNorm | None
    params: AttentionParams

    def begin(self, seed: DropoutSeed | None) -> AttentionPass:
        """Returns a new pass, with dropout masks of `seed`."""
        return AttentionPass(self.qkv.begin(seed), self.o.begin(seed))

    def forward(self, inputs: LayerInputs, pass_ctx: AttentionPass) -> tuple[AttentionActivations, torch.Tensor]:
        """Returns what backward needs and the block's output [T, hidden], which the caller may overwrite."""
        # Norm and projection. Norm's output n1 is not saved: backward recomputes it beside dx.
        _, n1, rstd = rms_norm.forward(inputs.x, self.norm)  # [T, hidden], [T]
        qkv, xa_qkv = self.qkv.forward(n1, pass_ctx.qkv)  # [T, (H + 2 H_kv) D], [T, R]

        # RoPE, in place unless there is a head norm; then attention.
        rotated = rotary_embedding.forward(qkv, *inputs.cos_sin, self.heads, self.head_norm)  # [T, (H + 2 H_kv) D]
        out, softmax = attention.forward(self.heads.split(rotated), inputs.sequences, self.params)  # [T, H, D]

        a, xa_o = self.o.forward(out.flatten(1), pass_ctx.o)  # [T, hidden], [T, R]
        a, post_norm = normalize(self.post_norm, a)
        return AttentionActivations(rstd, qkv, xa_qkv, out, xa_o, post_norm, softmax), a

    def backward(
        self, dh: torch.Tensor, inputs: LayerInputs, saved: AttentionActivations, pass_ctx: AttentionPass,
        *, wants_dx: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
        """Takes dh [T, hidden], the gradient of x + output; returns the gradient of x (through the block and past it)
        and those of the adapters, q k v first. dx is None unless wanted."""
        # Output projection.
        da = normalize_backward(self.post_norm, dh, saved.post_norm)  # [T, hidden]
        d_out, d_xa = self.o.backward(da, pass_ctx.o)  # [T, H D], [T, R]
        d_o = self.o.gradients(da, saved.out.flatten(1), saved.xa_o, d_xa, pass_ctx.o)

        # Attention and RoPE.
        d_qkv = self._attention_backward(d_out, inputs, saved)  # [T, (H + 2 H_kv) D]

        # Input projection and norm. The first layer's input needs no gradient; n1 is needed all the same, for dA.
        if wants_dx:
            dn1, d_xa = self.qkv.backward(d_qkv, pass_ctx.qkv)  # [T, hidden], [T, R]
            dx, n1 = rms_norm.backward(dn1, inputs.x, self.norm, saved.rstd, residual=dh, return_y=True)
        else:
            dx, d_xa = None, self.qkv.d_xa(d_qkv, pass_ctx.qkv)
            _, n1, _ = rms_norm.forward(inputs.x, self.norm)
        return dx, [*self.qkv.gradients(d_qkv, n1, saved.xa_qkv, d_xa, pass_ctx.qkv), *d_o]

    def _attention_backward(
        self, d_out: torch.Tensor, inputs: LayerInputs, saved: AttentionActivations
    ) -> torch.Tensor:
        """d_out [T, H D] -> gradient of the merged projection [T, (H + 2 H_kv) D]."""
        # q and k as attention saw them: saved so, or rotated again from before their norm.
        rotated = saved.qkv
        if self.head_norm is not None:
            rotated = rotary_embedding.forward(saved.qkv, *inputs.cos_sin, self.heads, self.head_norm)

        dq_dk_dv = attention.backward(
            d_out.view_as(saved.out),
            self.heads.split(rotated),
            saved.out,
            saved.softmax,
            inputs.sequences,
            self.params,
        )
        return rotary_embedding.backward(dq_dk_dv, saved.qkv, *inputs.cos_sin, self.heads, self.head_norm)
