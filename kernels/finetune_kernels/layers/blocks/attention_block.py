"""The attention block of a decoder layer: norm, merged q k v, RoPE, attention, projection, and Gemma's second norm.

q, k, v = rope(norm(x) Wqkv),   a = attention(q, k, v) Wo,   out = a, or norm(a) if the family has that norm

OLMo 2 has the second norm only, so that Wqkv reads x itself; Granite multiplies out by a constant. In Qwen3.5 Wqkv
makes a gate g beside q, head by head, and Wo reads attention(q, k, v) * sigmoid(g).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.lora_pass import LoraPass
from finetune_kernels.ops import attention, rms_norm, rotary_embedding
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.ops.rotary_embedding import Heads
from finetune_kernels.primitives.adapter_dropout import DropoutSeed
from finetune_kernels.primitives.attention_inputs import AttentionParams, PackedSequences
from finetune_kernels.primitives.head_norm import HeadNorm


class CosSin(NamedTuple):
    """RoPE's cos and sin for every token, [T, R] each."""

    cos: torch.Tensor
    sin: torch.Tensor
    query_scale: torch.Tensor | None = None
    """[T, 1, 1], factors of q in documents longer than those of pretraining (Ministral 3); None: 1."""


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
    """1 / root mean square of x [T]; empty if the block has no norm before it."""
    qkv: torch.Tensor
    """q, k, v [T, (H + 2 H_kv) D] after RoPE; for models with q/k norm, from before norm and RoPE. If heads are gated,
    the projection's output [T, (2 H + 2 H_kv) D]."""
    xa_qkv: torch.Tensor
    out: torch.Tensor
    """Attention's output [T, H, D], before its gate."""
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


def add_residual(out: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns rows + out [T, hidden] in the type of the residual stream `rows`; overwrites `out` if that is its own."""
    return out.add_(rows) if out.dtype == rows.dtype else rows + out


def normalize(
    norm: Norm | None, rows: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, NormActivations]:
    """Returns norm(rows) [T, hidden], of `dtype` or that of the rows, and what its backward needs; the rows themselves
    if there is no norm."""
    if norm is None:
        return rows, ()
    _, y, rstd = rms_norm.forward(rows, norm, dtype=dtype)
    return y, (rows, rstd)


def normalize_backward(norm: Norm | None, dy: torch.Tensor, saved: NormActivations, dtype: torch.dtype) -> torch.Tensor:
    """Gradient of `normalize`'s rows [T, hidden], in `dtype`, which is the rows' own."""
    return dy.to(dtype) if norm is None else rms_norm.backward(dy, saved[0], norm, saved[1])[0]


def pre_norm(
    norm: Norm | None, rows: torch.Tensor, delta: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns h = rows + delta (or rows), norm(h), both [T, hidden], and rstd [T]; without a norm, h twice and nothing.

    `delta` is overwritten. `dtype`: of norm(h); None for that of `rows`.
    """
    if norm is not None:
        return rms_norm.forward(rows, norm, delta, dtype)
    h = rows if delta is None else add_residual(delta, rows)
    return h, h.to(dtype or h.dtype), rows.new_empty(0, dtype=torch.float32)


def pre_norm_backward(
    norm: Norm | None, dn: torch.Tensor, rows: torch.Tensor, rstd: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of `rows` [T, hidden], the residual's added, and norm(rows) again; overwrites `dn`."""
    if norm is None:
        return add_residual(dn, residual), rows.to(dn.dtype)
    return rms_norm.backward(dn, rows, norm, rstd, residual=residual, return_y=True)


class NormedInput(NamedTuple):
    """The input of a block's first linear layers, for their backward."""

    rows: torch.Tensor
    """[T, hidden], before the norm."""
    rstd: torch.Tensor
    """1 / root mean square of the rows [T]."""
    xa: torch.Tensor


def input_backward(
    norm: Norm | None, group: LinearGroup, dy: torch.Tensor, read: NormedInput, pass_ctx: LoraPass,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
    """Takes dy [T, out] of a block's first linear layers; returns the gradient of the norm's rows [T, hidden], with
    `residual` added, and those of the adapters. Without `residual` the former is not wanted and is None."""
    if residual is not None:
        dn, d_xa = group.backward(dy, pass_ctx)  # [T, hidden], [T, R]
        dx, normed = pre_norm_backward(norm, dn, read.rows, read.rstd, residual)
    else:  # the rows are needed all the same, for dA
        dx, d_xa = None, group.d_xa(dy, pass_ctx)
        _, normed, _ = pre_norm(norm, read.rows, dtype=group.dtype)
    return dx, group.gradients(dy, normed, read.xa, d_xa, pass_ctx)


@dataclass
class AttentionBlock:
    """Weights and settings of the block; only the adapters train."""

    norm: Norm | None
    qkv: LinearGroup
    o: LinearGroup
    post_norm: Norm | None
    heads: Heads
    head_norm: HeadNorm | None
    params: AttentionParams
    rotates: bool = True
    """False for layers without RoPE."""
    multiplier: float = 1.0
    """Factor of the block's output (Granite)."""
    gates_heads: bool = False
    """True if the projection has a gate behind each head's queries."""

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linear layers."""
        return self.qkv, self.o

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights, in the order of `backward`."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def unflatten(self, tensors: list[torch.Tensor]) -> AttentionActivations:
        """Returns what `AttentionActivations.flat` took apart."""
        return AttentionActivations.unflatten(tensors, post_norm=self.post_norm is not None)

    def begin(self, seed: DropoutSeed | None) -> AttentionPass:
        """Returns a new pass, with dropout masks of `seed`."""
        return AttentionPass(self.qkv.begin(seed), self.o.begin(seed))

    def forward(
        self, inputs: LayerInputs, pass_ctx: AttentionPass, *, again: bool = False
    ) -> tuple[AttentionActivations, torch.Tensor]:
        """Returns what backward needs and the block's output [T, hidden], which the caller may overwrite. `again`: for
        backward, which changes nothing here."""
        # Norm and projection. Norm's output n1 is not saved: backward recomputes it beside dx.
        _, n1, rstd = pre_norm(self.norm, inputs.x, dtype=self.qkv.dtype)  # [T, hidden], [T]
        qkv, xa_qkv = self.qkv.forward(n1, pass_ctx.qkv)  # [T, (H + 2 H_kv) D], [T, R]

        rotated = self._rotate(self._without_gate(qkv), inputs.cos_sin)  # [T, (H + 2 H_kv) D]
        out, softmax = attention.forward(self.heads.split(rotated), inputs.sequences, self.params)  # [T, H, D]

        a, xa_o = self.o.forward(self._gated(out, qkv), pass_ctx.o)  # [T, hidden], [T, R]
        a, post_norm = normalize(self.post_norm, a, inputs.x.dtype)
        a = a if self.multiplier == 1 else a.mul_(self.multiplier)
        return AttentionActivations(rstd, qkv, xa_qkv, out, xa_o, post_norm, softmax), a

    def backward(
        self, dh: torch.Tensor, inputs: LayerInputs, saved: AttentionActivations, pass_ctx: AttentionPass,
        *, residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
        """Takes dh [T, hidden], the gradient of the output; returns the gradient of x and those of the adapters, q k v
        first. `residual` is the gradient of x past the block; without it, dx is not wanted and is None."""
        # Output projection.
        da = dh if self.multiplier == 1 else dh * self.multiplier
        da = normalize_backward(self.post_norm, da, saved.post_norm, self.o.dtype)  # [T, hidden]
        d_gated, d_xa = self.o.backward(da, pass_ctx.o)  # [T, H D], [T, R]
        d_o = self.o.gradients(da, self._gated(saved.out, saved.qkv), saved.xa_o, d_xa, pass_ctx.o)

        # Gate, attention and RoPE.
        d_out, d_gate = self._gate_backward(d_gated, saved)  # [T, H D], [T, H, D]
        d_qkv = self._attention_backward(d_out, inputs, saved)  # [T, (H + 2 H_kv) D]
        d_qkv = self._with_gate(d_qkv, d_gate)

        # Input projection and norm. The first layer's input needs no gradient.
        read = NormedInput(inputs.x, saved.rstd, saved.xa_qkv)
        dx, d_in = input_backward(self.norm, self.qkv, d_qkv, read, pass_ctx.qkv, residual)
        return dx, [*d_in, *d_o]

    def _split_gate(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the projection's output: q and its gate [T, H, D] each, k and v [T, 2 H_kv D]."""
        size = 2 * self.heads.query * self.heads.size
        q, gate = qkv[:, :size].view(-1, self.heads.query, 2, self.heads.size).unbind(2)
        return q, gate, qkv[:, size:]

    def _without_gate(self, qkv: torch.Tensor) -> torch.Tensor:
        """Returns q, k and v [T, (H + 2 H_kv) D] of the projection's output: a copy if there is a gate."""
        if not self.gates_heads:
            return qkv
        q, _, kv = self._split_gate(qkv)
        return torch.cat((q.flatten(1), kv), dim=1)

    def _with_gate(self, d_qkv: torch.Tensor, d_gate: torch.Tensor | None) -> torch.Tensor:
        """Returns the gradient of the projection's output, from those of q, k and v and of the gate."""
        if d_gate is None:
            return d_qkv
        size = self.heads.query * self.heads.size
        d_q = d_qkv[:, :size].view_as(d_gate)
        return torch.cat((torch.stack((d_q, d_gate), dim=2).flatten(1), d_qkv[:, size:]), dim=1)

    def _gated(self, out: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """Returns what the output projection reads [T, H D], for attention's output [T, H, D]."""
        if not self.gates_heads:
            return out.flatten(1)
        return (out * self._split_gate(qkv)[1].sigmoid()).flatten(1)

    def _gate_backward(
        self, d_gated: torch.Tensor, saved: AttentionActivations
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """d_gated [T, H D] -> gradients of attention's output [T, H D] and of the gate [T, H, D]; None without one."""
        if not self.gates_heads:
            return d_gated, None
        gate = self._split_gate(saved.qkv)[1].sigmoid()  # [T, H, D]
        d_out = d_gated.view_as(gate) * gate
        return d_out.flatten(1), d_out * saved.out * (1 - gate)

    def _rotate(self, qkv: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """Returns q, k and v [T, (H + 2 H_kv) D] as attention takes them; overwrites `qkv` unless q and k are
        normed."""
        if self.rotates or self.head_norm is not None:
            qkv = rotary_embedding.forward(qkv, *self._angles(cos_sin), self.heads, self.head_norm)
        if cos_sin.query_scale is not None:
            self.heads.split(qkv).q.mul_(cos_sin.query_scale)
        return qkv

    def _angles(self, cos_sin: CosSin) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin of this layer, [T, R] or [T, 0] each."""
        if self.rotates:
            return cos_sin.cos, cos_sin.sin
        return cos_sin.cos[:, :0], cos_sin.sin[:, :0]

    def _attention_backward(
        self, d_out: torch.Tensor, inputs: LayerInputs, saved: AttentionActivations
    ) -> torch.Tensor:
        """d_out [T, H D] -> gradient of the merged projection [T, (H + 2 H_kv) D]."""
        # q and k as attention saw them: saved so, or rotated again from before their norm, or without the gate.
        rotated = qkv = self._without_gate(saved.qkv)
        if self.head_norm is not None or self.gates_heads:
            rotated = self._rotate(qkv, inputs.cos_sin)

        dq_dk_dv = attention.backward(
            d_out.view_as(saved.out),
            self.heads.split(rotated),
            saved.out,
            saved.softmax,
            inputs.sequences,
            self.params,
        )
        if inputs.cos_sin.query_scale is not None:
            dq_dk_dv = dq_dk_dv._replace(q=dq_dk_dv.q * inputs.cos_sin.query_scale)
        angles = self._angles(inputs.cos_sin)
        return rotary_embedding.backward(dq_dk_dv, qkv, *angles, self.heads, self.head_norm)
