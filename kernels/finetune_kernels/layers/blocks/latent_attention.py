"""The attention block of a layer with latent attention (DeepSeek's MLA): norm, narrow projections, norms of the latent
vectors, wide projections, RoPE, attention, projection.

    c_q, c, r = norm(x) Wnarrow;   q = norm(c_q) Wq,   k, v = norm(c) Wkv;   out = attention(rope(q), rope(k | r), v) Wo

Each head of q and k has a part that RoPE turns and one that it does not; the turned part of k, r, is the same for all
heads. Smaller models have no c_q, and q comes from x. Heads of v are smaller than those of q and k: attention's kernels
want one size, so v is filled up with zeros, which add nothing to its output.

Saved are c_q, c, r and attention's output: q, k and v, which are twenty times as large in DeepSeek V3, are made of them
again for backward. There the turned part of a head comes first, as the kernel of RoPE turns the first elements.

Source: DeepSeek-AI, "DeepSeek-V2", 2024.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from finetune_kernels.layers.blocks.attention_block import LayerInputs, NormedInput, input_backward, pre_norm
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.lora_pass import LoraPass
from finetune_kernels.ops import attention, rms_norm, rotary_embedding
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.ops.rotary_embedding import Heads
from finetune_kernels.primitives.adapter_dropout import DropoutSeed
from finetune_kernels.primitives.attention.halves import Saved
from finetune_kernels.primitives.attention.inputs import AttentionParams


class LatentPass(NamedTuple):
    """The passes through the block's groups of linear layers."""

    narrow: LoraPass
    query: LoraPass | None
    """None if q comes from x."""
    key_value: LoraPass
    o: LoraPass


class LatentActivations(NamedTuple):
    """Tensors that the block's backward needs beside its input."""

    rstd: torch.Tensor
    """1 / root mean square of x [T]."""
    narrow: torch.Tensor
    """c_q (or q), c and r, side by side [T, N]."""
    xa_narrow: torch.Tensor
    out: torch.Tensor
    """Attention's output [T, H, D_v]."""
    xa_o: torch.Tensor
    softmax: Saved
    """What attention saved for its own backward."""

    def flat(self) -> list[torch.Tensor]:
        """All tensors, in the order that `unflatten` takes."""
        return [*self[:5], *self.softmax]


class Widened(NamedTuple):
    """A latent vector widened, and the tensors that the backward of that needs."""

    y: torch.Tensor
    """[T, wide]"""
    normed: torch.Tensor
    """The latent vector's norm [T, narrow]."""
    latent: torch.Tensor
    rstd: torch.Tensor
    """1 / root mean square of the latent vector [T]."""
    xa: torch.Tensor


@dataclass
class LatentProjection:
    """The norm of a latent vector and the projection that reads it."""

    norm: Norm
    wide: LinearGroup

    def forward(self, latent: torch.Tensor, pass_ctx: LoraPass) -> Widened:
        """latent [T, narrow], a view of a wider tensor -> y [T, wide]"""
        latent = latent.contiguous()
        _, normed, rstd = rms_norm.forward(latent, self.norm, dtype=self.wide.dtype)
        y, xa = self.wide.forward(normed, pass_ctx)
        return Widened(y, normed, latent, rstd, xa)

    def backward(self, dy: torch.Tensor, saved: Widened, pass_ctx: LoraPass) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """dy [T, wide] -> the gradients of the latent vector [T, narrow] and of the adapters."""
        d_normed, d_xa = self.wide.backward(dy, pass_ctx)
        d_latent, _ = rms_norm.backward(d_normed, saved.latent, self.norm, saved.rstd)
        return d_latent, self.wide.gradients(dy, saved.normed, saved.xa, d_xa, pass_ctx)


@dataclass(frozen=True)
class LatentHeads:
    """Heads of a row, all of one size: the turned part first."""

    heads: Heads
    """Those of q, k and v as attention takes them."""
    rotated: int
    value: int
    """Elements of a head of v."""

    @property
    def unrotated(self) -> int:
        """Elements of a head of q and k that are not turned."""
        return self.heads.size - self.rotated

    def merge(self, q: torch.Tensor, key_value: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
        """q [T, H D], the unturned part of k beside v [T, H (D_u + D_v)] and the turned part of all keys [T, R] -> the
        buffer [T, 3 H D] that RoPE and attention take."""
        count, cut = self.heads.query, self.rotated
        merged = q.new_empty(q.shape[0], 3, count, self.heads.size)
        own, shared = q.view(-1, count, self.heads.size), key_value.view(-1, count, self.unrotated + self.value)

        merged[:, 0, :, :cut], merged[:, 0, :, cut:] = own[..., self.unrotated :], own[..., : self.unrotated]
        merged[:, 1, :, :cut], merged[:, 1, :, cut:] = turned.unsqueeze(1), shared[..., : self.unrotated]
        merged[:, 2, :, : self.value], merged[:, 2, :, self.value :] = shared[..., self.unrotated :], 0
        return merged.flatten(1)

    def split(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradient of `merge`'s buffer [T, 3 H D] -> those of what it takes."""
        q, k, v = gradient.view(-1, 3, self.heads.query, self.heads.size).unbind(1)
        cut = self.rotated
        d_q = torch.cat((q[..., cut:], q[..., :cut]), dim=2)
        d_key_value = torch.cat((k[..., cut:], v[..., : self.value]), dim=2)
        return d_q.flatten(1), d_key_value.flatten(1), k[..., :cut].sum(1)

    def fill(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H, D_v] -> [T, H, D], with zeros behind."""
        return pad(x, (0, self.heads.size - self.value)) if self.heads.size > self.value else x


@dataclass
class LatentAttention:
    """Weights and settings of the block; only the adapters train."""

    norm: Norm | None
    narrow: LinearGroup
    query: LatentProjection | None
    """None if q comes from x."""
    key_value: LatentProjection
    o: LinearGroup
    heads: LatentHeads
    params: AttentionParams

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linear layers."""
        query = () if self.query is None else (self.query.wide,)
        return self.narrow, *query, self.key_value.wide, self.o

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights, in the order of `backward`."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def unflatten(self, tensors: list[torch.Tensor]) -> LatentActivations:
        """Returns what `LatentActivations.flat` took apart."""
        return LatentActivations(*tensors[:5], tuple(tensors[5:]))  # type: ignore[call-arg, arg-type]

    def begin(self, seed: DropoutSeed | None) -> LatentPass:
        """Returns a new pass, with dropout masks of `seed`."""
        query = None if self.query is None else self.query.wide.begin(seed)
        return LatentPass(self.narrow.begin(seed), query, self.key_value.wide.begin(seed), self.o.begin(seed))

    def forward(
        self, inputs: LayerInputs, pass_ctx: LatentPass, *, again: bool = False
    ) -> tuple[LatentActivations, torch.Tensor]:
        """Returns what backward needs and the block's output [T, hidden], which the caller may overwrite. `again`: for
        backward, which changes nothing here."""
        _, n1, rstd = pre_norm(self.norm, inputs.x, dtype=self.narrow.dtype)  # [T, hidden], [T]
        narrow, xa_narrow = self.narrow.forward(n1, pass_ctx.narrow)  # [T, N], [T, R]

        qkv, _, _ = self._widen(narrow, inputs, pass_ctx)  # [T, 3 H D]
        out, softmax = attention.forward(self.heads.heads.split(qkv), inputs.sequences, self.params)  # [T, H, D]
        out = out[..., : self.heads.value].contiguous()

        a, xa_o = self.o.forward(out.flatten(1), pass_ctx.o)  # [T, hidden], [T, R]
        return LatentActivations(rstd, narrow, xa_narrow, out, xa_o, softmax), a

    def backward(
        self, dh: torch.Tensor, inputs: LayerInputs, saved: LatentActivations, pass_ctx: LatentPass,
        *, residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
        """Takes dh [T, hidden], the gradient of the output; returns the gradient of x and those of the adapters, the
        narrow projections' first. `residual` is the gradient of x past the block; without it, dx is not wanted and is
        None."""
        # Output projection.
        dh = dh.to(self.o.dtype)
        d_out, d_xa = self.o.backward(dh, pass_ctx.o)  # [T, H D_v], [T, R]
        d_o = self.o.gradients(dh, saved.out.flatten(1), saved.xa_o, d_xa, pass_ctx.o)

        # Attention, RoPE and the wide projections.
        d_narrow, d_wide = self._attention_backward(d_out, inputs, saved, pass_ctx)  # [T, N]

        # Narrow projections and norm. The first layer's input needs no gradient.
        read = NormedInput(inputs.x, saved.rstd, saved.xa_narrow)
        dx, d_in = input_backward(self.norm, self.narrow, d_narrow, read, pass_ctx.narrow, residual)
        return dx, [*d_in, *d_wide, *d_o]

    def _split_narrow(self, narrow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of c_q (or q), c, and the turned part of the keys."""
        rank = self.key_value.norm.weight.numel()
        first = narrow.shape[1] - rank - self.heads.rotated
        c_q, c, turned = torch.split(narrow, [first, rank, self.heads.rotated], dim=1)
        return c_q, c, turned

    def _widen(
        self, narrow: torch.Tensor, inputs: LayerInputs, pass_ctx: LatentPass
    ) -> tuple[torch.Tensor, Widened | None, Widened]:
        """narrow [T, N] -> q, k and v [T, 3 H D] as attention takes them, and what they were made of."""
        c_q, c, turned = self._split_narrow(narrow)
        query = None
        if self.query is not None and pass_ctx.query is not None:
            query = self.query.forward(c_q, pass_ctx.query)
        key_value = self.key_value.forward(c, pass_ctx.key_value)

        q = c_q.contiguous() if query is None else query.y
        qkv = self.heads.merge(q, key_value.y, turned)
        return rotary_embedding.forward(qkv, *inputs.cos_sin[:2], self.heads.heads, None), query, key_value

    def _attention_backward(
        self, d_out: torch.Tensor, inputs: LayerInputs, saved: LatentActivations, pass_ctx: LatentPass
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """d_out [T, H D_v] -> gradients of the narrow projections' output [T, N], and of the adapters behind them."""
        heads = self.heads.heads
        qkv, query, key_value = self._widen(saved.narrow, inputs, pass_ctx)
        gradients = attention.backward(
            self.heads.fill(d_out.view_as(saved.out)),
            heads.split(qkv),
            self.heads.fill(saved.out),
            saved.softmax,
            inputs.sequences,
            self.params,
        )
        d_qkv = rotary_embedding.backward(gradients, qkv, *inputs.cos_sin[:2], heads, None)
        d_q, d_kv, d_turned = self.heads.split(d_qkv)

        d_query = list[torch.Tensor]()
        if self.query is not None and query is not None and pass_ctx.query is not None:
            d_q, d_query = self.query.backward(d_q, query, pass_ctx.query)
        d_c, d_key_value = self.key_value.backward(d_kv, key_value, pass_ctx.key_value)
        return torch.cat((d_q, d_c, d_turned), dim=1), [*d_query, *d_key_value]
