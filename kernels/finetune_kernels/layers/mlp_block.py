"""The feed-forward half of a decoder layer: gated MLP, and Gemma's norm after it.

    m = (f(n Wgate) * n Wup) Wdown,   added = m, or norm(m) where the family has that norm

Small adapters' shares of gate and up are added where the two are used, the activation's product comes out of backward's
kernel once more, and the norm before (`norm`) runs together with the residual additions of the layer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from finetune_kernels.layers.adapters import LoraPass
from finetune_kernels.layers.attention_block import Norm, NormActivations, normalize, normalize_back
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.ops import adapted_activation, rms_norm
from finetune_kernels.ops.gated_activation import Activation
from finetune_kernels.primitives.adapter_dropout import DropoutSeed


class MlpPass(NamedTuple):
    """What one pass is made with."""

    gate_up: LoraPass
    down: LoraPass

    def from_row(self, row: int) -> "MlpPass":
        """For rows that begin `row` further on."""
        return MlpPass(self.gate_up.from_row(row), self.down.from_row(row))


class GateUpActivations(NamedTuple):
    """Results of the first projection, without the shares of small adapters, and n A^T."""

    gate_up: torch.Tensor
    xa: torch.Tensor


class DownActivations(NamedTuple):
    """What backward may use of the second projection."""

    xa_down: torch.Tensor
    post: NormActivations


@dataclass
class MlpBlock:
    """Weights and settings; only the adapters train."""

    norm: Norm
    gate_up: LinearGroup
    down: LinearGroup
    post_norm: Norm | None
    activation: Activation

    def begin(self, seed: DropoutSeed | None) -> MlpPass:
        """A pass with the masks of `seed`."""
        return MlpPass(self.gate_up.begin(seed), self.down.begin(seed))

    def project(self, n2: torch.Tensor, pass_ctx: MlpPass) -> GateUpActivations:
        """Normalised h [T, hidden] -> gate and up side by side."""
        if self.gate_up.fuses_into_activation:
            return GateUpActivations(self.gate_up.base(n2, pass_ctx.gate_up), self.gate_up.xa(n2, pass_ctx.gate_up))
        return GateUpActivations(*self.gate_up.forward(n2, pass_ctx.gate_up))

    def finish(self, projected: GateUpActivations, pass_ctx: MlpPass) -> tuple[DownActivations, torch.Tensor]:
        """What is kept, and what is to be added to h (a tensor that may be written to)."""
        shares = self.gate_up.lora_deltas(projected.xa, pass_ctx.gate_up)
        activated = adapted_activation.forward(projected.gate_up, self.activation, shares)
        m, xa_down = self.down.forward(activated, pass_ctx.down)
        added, post = normalize(self.post_norm, m)
        return DownActivations(xa_down, post), added

    def backward(
        self, dy: torch.Tensor, h: torch.Tensor, r2: torch.Tensor, projected: GateUpActivations,
        finished: DownActivations | None, pass_ctx: MlpPass,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
        """dy [T, hidden], the gradient of h + added -> that of h (both ways) and of the adapters, gate and up first.
        Without `finished` it is made again, as far as it is needed."""
        if finished is None and self.post_norm is not None:
            finished, _ = self.finish(projected, pass_ctx)
        dm = dy if finished is None else normalize_back(self.post_norm, dy, finished.post)
        d_activated, d_xa_down = self.down.backward_base(dm, pass_ctx.down)
        shares = self.gate_up.lora_deltas(projected.xa, pass_ctx.gate_up)
        after = None
        if pass_ctx.down.masks or not self.down.fuses_into_activation:
            self.down.add_lora_dx(d_activated, d_xa_down, pass_ctx.down)
        elif self.down.parameters:
            after = d_xa_down, self.down.a()
        d_gate_up = adapted_activation.backward(d_activated, projected.gate_up, self.activation, shares, after)
        activated = d_activated
        xa_down = self.down.xa(activated, pass_ctx.down) if finished is None else finished.xa_down
        of_down = self.down.gradients(dm, activated, xa_down, d_xa_down, pass_ctx.down)
        del activated, d_activated
        dn2, d_xa = self.gate_up.backward(d_gate_up, pass_ctx.gate_up)
        dh, n2 = rms_norm.backward(dn2, h, self.norm.weight, r2, residual=dy, return_y=True)
        of_gate_up = self.gate_up.gradients(d_gate_up, n2, projected.xa, d_xa, pass_ctx.gate_up)
        return dh, [*of_gate_up, *of_down]
