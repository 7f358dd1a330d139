"""Turns the output of attention's first projections into q, k and v as attention takes them: normed and rotated.

    [q | k | v] = rope(norm(projected))                                [T, (H + 2 H_kv) D]

Qwen3.5's projection has a gate beside q, head by head, and attention's output is multiplied by sigmoid(gate). Gemma 4's
full layers have no projection of v, which is k's before its norm; layers that reuse another layer's k and v make q
alone, and H_kv is 0.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from finetune_kernels.ops import rotary_embedding
from finetune_kernels.ops.rotary_embedding import Heads
from finetune_kernels.primitives.attention.inputs import Qkv
from finetune_kernels.primitives.head_norm import HeadNorm


class CosSin(NamedTuple):
    """RoPE's cos and sin for every token, [T, R] each."""

    cos: torch.Tensor
    sin: torch.Tensor
    query_scale: torch.Tensor | None = None
    """[T, 1, 1], factors of q in documents longer than those of pretraining (Ministral 3); None: 1."""


@dataclass(frozen=True)
class ProjectedHeads:
    """Heads of a row of the first projections' output [T, N]."""

    heads: Heads
    """Those of q, k and v as attention takes them."""
    norm: HeadNorm | None
    rotates: bool = True
    """False for layers without RoPE."""
    gates: bool = False
    """True if the projection has a gate behind each head's queries."""
    keys_are_values: bool = False
    """True if the projection has no v."""

    def whole(self, projected: torch.Tensor) -> torch.Tensor:
        """Returns q, k and v [T, (H + 2 H_kv) D] before norm and RoPE: a copy if the projection makes anything else."""
        if self.gates:
            q, _, kv = self._split_gate(projected)
            return torch.cat((q.flatten(1), kv), dim=1)
        if self.keys_are_values:
            return torch.cat((projected, projected[:, self.heads.query * self.heads.size :]), dim=1)
        return projected

    def rotate(self, qkv: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """Returns q, k and v [T, (H + 2 H_kv) D] of `whole` as attention takes them; overwrites `qkv` unless q and k
        are normed."""
        if self.rotates or self.norm is not None:
            qkv = rotary_embedding.forward(qkv, *self._angles(cos_sin), self.heads, self.norm)
        if cos_sin.query_scale is not None:
            self.heads.split(qkv).q.mul_(cos_sin.query_scale)
        return qkv

    def rotate_again(self, qkv: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """Returns what `rotate` has returned; `qkv` is `whole` of the projection's output that it left."""
        is_left = self.norm is not None or self.gates or self.keys_are_values
        return self.rotate(qkv, cos_sin) if is_left else qkv

    def backward(self, gradients: Qkv, d_gate: torch.Tensor | None, qkv: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """Returns the gradient of the projection's output [T, N], from those of q, k and v as attention takes them and
        of the gate [T, H, D]. `qkv` is read if q and k are normed."""
        if cos_sin.query_scale is not None:
            gradients = gradients._replace(q=gradients.q * cos_sin.query_scale)
        d_qkv = rotary_embedding.backward(gradients, qkv, *self._angles(cos_sin), self.heads, self.norm)

        size = self.heads.query * self.heads.size
        if self.keys_are_values:
            _, d_k, d_v = self.heads.split(d_qkv)
            return torch.cat((d_qkv[:, :size], (d_k + d_v).flatten(1)), dim=1)
        if d_gate is None:
            return d_qkv
        d_q = d_qkv[:, :size].view_as(d_gate)
        return torch.cat((torch.stack((d_q, d_gate), dim=2).flatten(1), d_qkv[:, size:]), dim=1)

    def gated(self, out: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Returns what the output projection reads [T, H D], for attention's output [T, H, D]."""
        if not self.gates:
            return out.flatten(1)
        return (out * self._split_gate(projected)[1].sigmoid()).flatten(1)

    def gate_backward(
        self, d_gated: torch.Tensor, out: torch.Tensor, projected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """d_gated [T, H D] -> gradients of attention's output `out` [T, H, D] and of the gate [T, H, D]; None without
        one."""
        if not self.gates:
            return d_gated.view_as(out), None
        gate = self._split_gate(projected)[1].sigmoid()  # [T, H, D]
        d_out = d_gated.view_as(gate) * gate
        return d_out, d_out * out * (1 - gate)

    def _split_gate(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the projection's output: q and its gate [T, H, D] each, k and v [T, 2 H_kv D]."""
        size = 2 * self.heads.query * self.heads.size
        q, gate = projected[:, :size].view(-1, self.heads.query, 2, self.heads.size).unbind(2)
        return q, gate, projected[:, size:]

    def _angles(self, cos_sin: CosSin) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin of this layer, [T, R] or [T, 0] each."""
        if self.rotates:
            return cos_sin.cos, cos_sin.sin
        return cos_sin.cos[:, :0], cos_sin.sin[:, :0]
