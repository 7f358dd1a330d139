"""The third block of a decoder layer, of models whose layers have inputs of their own (Gemma 4 E2B and E4B).

    y = h + norm((f(h Wgate) * p) Wout)              p [T, P]: the layer's input, made of the tokens before all layers

P is a tenth of the hidden size, so the block is a hundredth of the layer's products: nothing of it is saved, and
backward runs it again.

No norm stands before Wgate. In fp16, the residual stream is fp32 and may be larger than fp16 holds: h is divided on its
way into the product, and the product multiplied again.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from finetune_kernels.layers.blocks.attention_block import (
    NormActivations,
    add_residual,
    normalize,
    normalize_backward,
)
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.lora_pass import LoraPass
from finetune_kernels.ops import gated_activation
from finetune_kernels.ops.gated_activation import Activation
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.primitives.adapter_dropout import DropoutSeed

WIDE_STEP = 64.0
"""Divisor of a residual stream in fp32: 64 times fp16's 65,504."""


class LayerInputPass(NamedTuple):
    """The passes through the block's two linear layers."""

    gate: LoraPass
    projection: LoraPass


class LayerInputActivations(NamedTuple):
    """Everything that the block computes, each [T, ...]."""

    h: torch.Tensor
    """The block's input in the compute type, divided by `step`."""
    own: torch.Tensor
    """The layer's input p in the compute type."""
    gate: torch.Tensor
    xa_gate: torch.Tensor
    product: torch.Tensor
    """f(gate) * p."""
    xa_projection: torch.Tensor
    post_norm: NormActivations
    out: torch.Tensor
    """The block's output without h."""
    step: float
    """1, or what h is divided by."""


@dataclass
class LayerInputBlock:
    """Weights and settings of the block; only the adapters train."""

    gate: LinearGroup
    projection: LinearGroup
    post_norm: Norm
    activation: Activation

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linear layers."""
        return self.gate, self.projection

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights, in the order of `backward`."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def begin(self, seed: DropoutSeed | None) -> LayerInputPass:
        """Returns a new pass, with dropout masks of `seed`."""
        return LayerInputPass(self.gate.begin(seed), self.projection.begin(seed))

    def forward(self, h: torch.Tensor, own: torch.Tensor, pass_ctx: LayerInputPass) -> torch.Tensor:
        """h [T, hidden] and the layer's input [T, P] -> y [T, hidden]"""
        return add_residual(self._run(h, own, pass_ctx).out, h)

    def backward(
        self, dy: torch.Tensor, h: torch.Tensor, own: torch.Tensor, pass_ctx: LayerInputPass
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Takes dy [T, hidden]; returns the gradients of h [T, hidden], of the layer's input [T, P] and of the
        adapters, the gate's first."""
        made = self._run(h, own, pass_ctx)
        dm = normalize_backward(self.post_norm, dy, made.post_norm, self.projection.dtype)  # [T, hidden]

        d_product, d_xa = self.projection.backward(dm, pass_ctx.projection)  # [T, P], [T, R]
        d_projection = self.projection.gradients(dm, made.product, made.xa_projection, d_xa, pass_ctx.projection)

        d_gate, d_own = gated_activation.backward(d_product, made.gate, made.own, self.activation)
        dh, d_xa = self.gate.backward(d_gate, pass_ctx.gate)  # [T, hidden], [T, R]
        if made.step != 1:
            d_gate, d_xa = d_gate * made.step, d_xa * made.step
        d_adapter = self.gate.gradients(d_gate, made.h, made.xa_gate, d_xa, pass_ctx.gate)
        return add_residual(dh, dy), d_own.to(own.dtype), [*d_adapter, *d_projection]

    def _run(self, h: torch.Tensor, own: torch.Tensor, pass_ctx: LayerInputPass) -> LayerInputActivations:
        step = WIDE_STEP if h.dtype is torch.float32 and self.gate.dtype is torch.float16 else 1.0
        rows, own = (h if step == 1 else h / step).to(self.gate.dtype), own.to(self.gate.dtype).contiguous()
        gate, xa_gate = self.gate.forward(rows, pass_ctx.gate)  # [T, P], [T, R]
        gate = gate if step == 1 else gate.mul_(step)
        product = gated_activation.forward(gate, own, self.activation)
        out, xa_projection = self.projection.forward(product, pass_ctx.projection)  # [T, hidden], [T, R]

        out, post_norm = normalize(self.post_norm, out, h.dtype)
        return LayerInputActivations(rows, own, gate, xa_gate, product, xa_projection, post_norm, out, step)
