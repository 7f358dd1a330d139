"""The attention block of a decoder layer: norm, merged q k v, RoPE, attention, projection, and Gemma's second norm.

q, k, v = rope(norm(x) Wqkv),   a = attention(q, k, v) Wo,   out = a, or norm(a) if the family has that norm

OLMo 2 has the second norm only, so that Wqkv reads x itself; Granite multiplies out by a constant. In Qwen3.5 Wqkv
makes a gate g beside q, head by head, and Wo reads attention(q, k, v) * sigmoid(g). In Gemma 4 E2B a layer may take k
and v of an earlier one (`sharing`). What the projection makes is `projected_heads`' subject.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from finetune_kernels.layers.blocks.projected_heads import CosSin, ProjectedHeads
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.lora_pass import LoraPass
from finetune_kernels.ops import attention, rms_norm
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.primitives.adapter_dropout import DropoutSeed
from finetune_kernels.primitives.attention.halves import Saved
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv


class LayerInputs(NamedTuple):
    """The input of a layer: its rows, and what all layers of a pass share."""

    x: torch.Tensor
    """[T, hidden]"""
    cos_sin: CosSin
    sequences: PackedSequences
    own: torch.Tensor | None = None
    """[T, P], the layer's own input beside x (Gemma 4 E2B)."""
    kv: torch.Tensor | None = None
    """[T, 2 H_kv D], k and v of an earlier layer as attention takes them, for a layer that reuses them."""
    d_kv: torch.Tensor | None = None
    """The gradient of the keys and values that this layer stores, from those that reuse them; for backward."""


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
    """q, k, v [T, (H + 2 H_kv) D] after RoPE; the projection's output [T, N] from before norm and RoPE for models with
    q/k norm, or if it is anything but q, k and v."""
    xa_qkv: torch.Tensor
    out: torch.Tensor
    """Attention's output [T, H, D], before its gate."""
    xa_o: torch.Tensor
    post_norm: NormActivations
    softmax: Saved
    """What attention saved for its own backward: the softmax sums and, for some backends, random state."""
    kv: torch.Tensor | None = None
    """[T, 2 H_kv D], keys and values for later layers; not saved with the others."""

    def flat(self) -> list[torch.Tensor]:
        """All tensors to save, in the order that `unflatten` takes."""
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
    projected: ProjectedHeads
    params: AttentionParams
    multiplier: float = 1.0
    """Factor of the block's output (Granite)."""
    sharing: Literal["stores", "reuses"] | None = None
    """What the layer does with keys and values that several layers have; None: they are its own."""

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
        backward, where keys and values are not stored again."""
        # Norm and projection. Norm's output n1 is not saved: backward recomputes it beside dx.
        _, n1, rstd = pre_norm(self.norm, inputs.x, dtype=self.qkv.dtype)  # [T, hidden], [T]
        qkv, xa_qkv = self.qkv.forward(n1, pass_ctx.qkv)  # [T, (H + 2 H_kv) D], [T, R]

        rotated = self.projected.rotate(self.projected.whole(qkv), inputs.cos_sin)  # [T, (H + 2 H_kv) D]
        out, softmax = attention.forward(self._split(rotated, inputs), inputs.sequences, self.params)  # [T, H, D]
        kv = self._own_kv(rotated) if self.sharing == "stores" and not again else None

        a, xa_o = self.o.forward(self.projected.gated(out, qkv), pass_ctx.o)  # [T, hidden], [T, R]
        a, post_norm = normalize(self.post_norm, a, inputs.x.dtype)
        a = a if self.multiplier == 1 else a.mul_(self.multiplier)
        return AttentionActivations(rstd, qkv, xa_qkv, out, xa_o, post_norm, softmax, kv), a

    def backward(
        self, dh: torch.Tensor, inputs: LayerInputs, saved: AttentionActivations, pass_ctx: AttentionPass,
        *, residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
        """Takes dh [T, hidden], the gradient of the output; returns the gradient of x and those of the adapters, q k v
        first, and before them that of the keys and values that the layer reuses. `residual` is the gradient of x past
        the block; without it, dx is not wanted and is None."""
        # Output projection.
        da = dh if self.multiplier == 1 else dh * self.multiplier
        da = normalize_backward(self.post_norm, da, saved.post_norm, self.o.dtype)  # [T, hidden]
        d_gated, d_xa = self.o.backward(da, pass_ctx.o)  # [T, H D], [T, R]
        gated = self.projected.gated(saved.out, saved.qkv)
        d_o = self.o.gradients(da, gated, saved.xa_o, d_xa, pass_ctx.o)
        del gated

        # Gate, attention and RoPE.
        d_out, d_gate = self.projected.gate_backward(d_gated, saved.out, saved.qkv)  # [T, H, D] each
        qkv = self.projected.whole(saved.qkv)  # [T, (H + 2 H_kv) D]
        d_attended, d_kv = self._attention_backward(d_out, qkv, inputs, saved)
        d_qkv = self.projected.backward(d_attended, d_gate, qkv, inputs.cos_sin)  # [T, N]

        # Input projection and norm. The first layer's input needs no gradient.
        read = NormedInput(inputs.x, saved.rstd, saved.xa_qkv)
        dx, d_in = input_backward(self.norm, self.qkv, d_qkv, read, pass_ctx.qkv, residual)
        return dx, [*d_kv, *d_in, *d_o]

    def _attention_backward(
        self, d_out: torch.Tensor, qkv: torch.Tensor, inputs: LayerInputs, saved: AttentionActivations
    ) -> tuple[Qkv, list[torch.Tensor]]:
        """d_out [T, H, D] and `whole` of the projection's output -> gradients of the layer's own q, k and v, and of the
        k and v [T, 2 H_kv D] that it reuses, if it does."""
        rotated = self.projected.rotate_again(qkv, inputs.cos_sin)
        dq, dk, dv = attention.backward(
            d_out, self._split(rotated, inputs), saved.out, saved.softmax, inputs.sequences, self.params
        )
        if self.sharing == "reuses":
            nothing = dq[:, :0]
            return Qkv(dq, nothing, nothing), [torch.cat((dk, dv), dim=1).flatten(1)]
        if inputs.d_kv is not None:
            d_k, d_v = _halves(inputs.d_kv, self.projected.heads.size)
            dk, dv = dk + d_k, dv + d_v
        return Qkv(dq, dk, dv), []

    def _split(self, rotated: torch.Tensor, inputs: LayerInputs) -> Qkv:
        """Views of q, k and v, of which k and v may be another layer's."""
        own = self.projected.heads.split(rotated)
        return own if inputs.kv is None else Qkv(own.q, *_halves(inputs.kv, self.projected.heads.size))

    def _own_kv(self, rotated: torch.Tensor) -> torch.Tensor:
        """Returns a copy of k and v, side by side [T, 2 H_kv D]."""
        heads = self.projected.heads
        return rotated[:, heads.query * heads.size :].clone()


def _halves(kv: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of k and v, [T, H_kv, D] each."""
    k, v = kv.view(kv.shape[0], 2, -1, size).unbind(1)
    return k, v
