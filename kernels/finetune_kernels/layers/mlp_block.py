"""The feed-forward half of a decoder layer: gated MLP, and Gemma's norm after it.

    m = (f(n Wgate) * n Wup) Wdown,   added = m, or norm(m) where the family has that norm

Small adapters' shares of gate and up are added where the two are used, the activation's product comes out of backward's
kernel once more, and the norm before (`norm`) runs together with the residual additions of the layer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from finetune_kernels.layers.adapters import GroupPass
from finetune_kernels.layers.attention_block import Kept, Norm, normalize, normalize_back
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.ops import adapted_activation, rms_norm
from finetune_kernels.ops.gated_activation import Activation
from finetune_kernels.primitives.adapter_dropout import Draw


class MlpPass(NamedTuple):
    """What one pass is made with."""

    gate_up: GroupPass
    down: GroupPass

    def from_row(self, row: int) -> "MlpPass":
        """For rows that begin `row` further on."""
        return MlpPass(self.gate_up.from_row(row), self.down.from_row(row))


class Projected(NamedTuple):
    """Results of the first projection, without the shares of small adapters, and n A^T."""

    gate_up: torch.Tensor
    inner: torch.Tensor


class Finished(NamedTuple):
    """What backward may use of the second projection."""

    inner_down: torch.Tensor
    post: Kept


@dataclass
class MlpHalf:
    """Weights and settings; only the adapters train."""

    norm: Norm
    gate_up: LinearGroup
    down: LinearGroup
    post_norm: Norm | None
    activation: Activation

    def begin(self, draw: Draw | None) -> MlpPass:
        """A pass with the masks of `draw`."""
        return MlpPass(self.gate_up.begin(draw), self.down.begin(draw))

    def project(self, n2: torch.Tensor, now: MlpPass) -> Projected:
        """Normalised h [T, hidden] -> gate and up side by side."""
        if self.gate_up.is_small:
            return Projected(self.gate_up.base(n2, now.gate_up), self.gate_up.inner(n2, now.gate_up))
        return Projected(*self.gate_up.forward(n2, now.gate_up))

    def finish(self, projected: Projected, now: MlpPass) -> tuple[Finished, torch.Tensor]:
        """What is kept, and what is to be added to h (a tensor that may be written to)."""
        shares = self.gate_up.shares(projected.inner, now.gate_up)
        activated = adapted_activation.forward(projected.gate_up, self.activation, shares)
        m, inner_down = self.down.forward(activated, now.down)
        added, post = normalize(self.post_norm, m)
        return Finished(inner_down, post), added

    def backward(
        self, dy: torch.Tensor, h: torch.Tensor, r2: torch.Tensor, projected: Projected, finished: Finished | None,
        now: MlpPass,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
        """dy [T, hidden], the gradient of h + added -> that of h (both ways) and of the adapters, gate and up first.
        Without `finished` it is made again, as far as it is needed."""
        if finished is None and self.post_norm is not None:
            finished, _ = self.finish(projected, now)
        dm = dy if finished is None else normalize_back(self.post_norm, dy, finished.post)
        d_activated, d_inner_down = self.down.backward_base(dm, now.down)
        shares = self.gate_up.shares(projected.inner, now.gate_up)
        after = None
        if now.down.masks or not self.down.is_small:
            self.down.add_shares(d_activated, d_inner_down, now.down)
        elif self.down.parameters:
            after = d_inner_down, self.down.a()
        d_gate_up = adapted_activation.backward(d_activated, projected.gate_up, self.activation, shares, after)
        activated = d_activated
        inner_down = self.down.inner(activated, now.down) if finished is None else finished.inner_down
        of_down = self.down.gradients(dm, activated, inner_down, d_inner_down, now.down)
        del activated, d_activated
        dn2, d_inner = self.gate_up.backward(d_gate_up, now.gate_up)
        dh, n2 = rms_norm.backward(dn2, h, self.norm.weight, r2, residual=dy, again=True)
        of_gate_up = self.gate_up.gradients(d_gate_up, n2, projected.inner, d_inner, now.gate_up)
        return dh, [*of_gate_up, *of_down]
