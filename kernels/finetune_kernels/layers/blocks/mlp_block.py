"""The MLP block of a decoder layer: norm, MLP with a gate or without, and Gemma's norm after it.

    m = (f(n Wgate) * n Wup) Wdown, or f(n Wup) Wdown;   out = m, or norm(m) if the family has that norm

LoRA deltas of gate and up are added inside the activation's kernel if no rank is over 64. The activation's product is
not saved: backward's kernel recomputes it. The norm before (`norm`) runs together with the layer's residual additions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from finetune_kernels.layers.blocks.attention_block import (
    NormActivations,
    normalize,
    normalize_backward,
    pre_norm_backward,
)
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.lora_pass import LoraPass
from finetune_kernels.ops import adapted_activation, plain_activation
from finetune_kernels.ops.adapted_activation import LoraDx
from finetune_kernels.ops.gated_activation import Activation
from finetune_kernels.ops.plain_activation import PlainKind
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.primitives.adapter_dropout import DropoutSeed


class MlpPass(NamedTuple):
    """The passes through the block's two groups of linear layers."""

    gate_up: LoraPass
    down: LoraPass

    def from_row(self, row: int) -> "MlpPass":
        """The same pass for a tile that begins at `row`."""
        return MlpPass(self.gate_up.from_row(row), self.down.from_row(row))


class GateUpActivations(NamedTuple):
    """Output of the gate and up projection, or of the up projection alone."""

    y: torch.Tensor
    """gate and up side by side [T, 2 F], or up [T, F]; for LoRA ranks up to 64 without LoRA's part, which is added
    later."""
    xa: torch.Tensor
    """n A^T [T, R]."""


class DownActivations(NamedTuple):
    """Tensors of the down projection that backward can use; it recomputes them if they are not saved."""

    xa: torch.Tensor
    """act A^T [T, R]."""
    post_norm: NormActivations


class SavedMlp(NamedTuple):
    """Tensors that the block's backward works from."""

    h: torch.Tensor
    """The block's input [T, hidden], before its norm."""
    rstd: torch.Tensor
    """1 / root mean square of h [T]."""
    gate_up: Any
    """What the block's own `gate_up_projection` returned; None if the MLP is tiled, and makes it again tile by tile."""
    down: DownActivations | None
    """None if it was not saved: the block makes as much of it again as it needs."""


@dataclass
class MlpBlock:
    """Weights and settings of the block; only the adapters train."""

    norm: Norm | None
    gate_up: LinearGroup
    down: LinearGroup
    post_norm: Norm | None
    activation: Activation | PlainKind
    """A name if there is a gate."""
    multiplier: float = 1.0
    """Factor of the block's output (Granite)."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Compute type, which the norm before the block writes."""
        return self.gate_up.dtype

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The groups of linear layers."""
        return self.gate_up, self.down

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights, in the order of `backward`."""
        return [*self.gate_up.parameters, *self.down.parameters]

    def take(self, tensors: Sequence[Any]) -> tuple[GateUpActivations, list[Any]]:
        """Returns gate and up, which begin saved `tensors`, and the tensors behind them."""
        return GateUpActivations(*tensors[:2]), list(tensors[2:])

    @contextmanager
    def dequantized(self) -> Iterator[None]:
        """Dequantises both weights once for what is computed inside."""
        with self.gate_up.frozen.dequantized(), self.down.frozen.dequantized():
            yield

    def begin(self, seed: DropoutSeed | None) -> MlpPass:
        """Returns a new pass, with dropout masks of `seed`."""
        return MlpPass(self.gate_up.begin(seed), self.down.begin(seed))

    def gate_up_projection(self, n2: torch.Tensor, pass_ctx: MlpPass) -> GateUpActivations:
        """Normalised h [T, hidden] -> gate and up side by side [T, 2 F]."""
        if self.gate_up.fuses_into_activation:
            return GateUpActivations(self.gate_up.base(n2, pass_ctx.gate_up), self.gate_up.xa(n2, pass_ctx.gate_up))
        return GateUpActivations(*self.gate_up.forward(n2, pass_ctx.gate_up))

    def down_projection(
        self, gate_up: GateUpActivations, pass_ctx: MlpPass, stream: torch.dtype | None = None
    ) -> tuple[DownActivations, torch.Tensor]:
        """Activation and down projection; returns what backward needs and the block's output [T, hidden], which the
        caller may overwrite. `stream`: type of the residual stream, which the second norm writes; None: its input's."""
        act = self._activate(gate_up, pass_ctx)  # [T, F]
        out, xa = self.down.forward(act, pass_ctx.down)  # [T, hidden], [T, R]
        out, post_norm = normalize(self.post_norm, out, stream)
        out = out if self.multiplier == 1 else out.mul_(self.multiplier)
        return DownActivations(xa, post_norm), out

    def finish(self, down: DownActivations, stream: torch.dtype) -> torch.Tensor:
        """Returns the block's output [T, hidden] of saved activations, of a block with a second norm."""
        return normalize(self.post_norm, down.post_norm[0], stream)[0]

    def _activate(self, gate_up: GateUpActivations, pass_ctx: MlpPass) -> torch.Tensor:
        """Returns f(gate) * up, or f(up), [T, F]. LoRA deltas are added inside the kernel: no extra pass over
        [T, F]."""
        if isinstance(self.activation, PlainKind):
            (delta,) = self.gate_up.lora_deltas(gate_up.xa, pass_ctx.gate_up, parts=1)
            return plain_activation.forward(gate_up.y, self.activation, delta)
        gate, up = self.gate_up.lora_deltas(gate_up.xa, pass_ctx.gate_up, parts=2)
        return adapted_activation.forward(gate_up.y, self.activation, (gate, up))

    def _activate_backward(
        self, d_act: torch.Tensor, gate_up: GateUpActivations, down_delta: LoraDx | None, pass_ctx: MlpPass
    ) -> torch.Tensor:
        """d_act [T, F], over which the activation itself is written -> gradient of `gate_up.y`."""
        if isinstance(self.activation, PlainKind):
            (delta,) = self.gate_up.lora_deltas(gate_up.xa, pass_ctx.gate_up, parts=1)
            return plain_activation.backward(d_act, gate_up.y, self.activation, delta, down_delta)
        gate, up = self.gate_up.lora_deltas(gate_up.xa, pass_ctx.gate_up, parts=2)
        return adapted_activation.backward(d_act, gate_up.y, self.activation, (gate, up), down_delta)

    def backward(
        self, dy: torch.Tensor, saved: SavedMlp, pass_ctx: MlpPass, *, residual: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Takes dy [T, hidden], the gradient of the output; returns the gradient of h and those of the adapters, gate
        and up first. `residual` is the gradient of h past the block."""
        gate_up, down = saved.gate_up, saved.down
        # Gemma's second norm needs its input; without that norm dm is dy itself.
        if down is None and self.post_norm is not None:
            down, _ = self.down_projection(gate_up, pass_ctx)
        dm = dy if self.multiplier == 1 else dy * self.multiplier  # [T, hidden]
        dm = normalize_backward(self.post_norm, dm, () if down is None else down.post_norm, self.down.dtype)

        # Down projection. Its adapter's part of d_act is added inside the activation's kernel, too, unless that kernel
        # cannot: it knows no dropout mask and no rank over 64.
        d_act, d_xa_down = self.down.backward_base(dm, pass_ctx.down)  # [T, F], [T, R]
        down_delta = None
        if pass_ctx.down.drops or not self.down.fuses_into_activation:
            self.down.add_lora_dx(d_act, d_xa_down, pass_ctx.down)
        elif self.down.parameters:
            down_delta = d_xa_down, self.down.a()

        # Activation. The kernel writes the activation itself over d_act, which dA of the down projection reads.
        d_gate_up = self._activate_backward(d_act, gate_up, down_delta, pass_ctx)  # [T, 2 F] or [T, F]
        act = d_act
        xa_down = self.down.xa(act, pass_ctx.down) if down is None else down.xa
        d_down = self.down.gradients(dm, act, xa_down, d_xa_down, pass_ctx.down)
        del act, d_act  # 2 F bytes a token, before the next product needs as much

        # Gate and up projection, and norm; the kernel recomputes n2 beside dh.
        dn2, d_xa = self.gate_up.backward(d_gate_up, pass_ctx.gate_up)  # [T, hidden], [T, R]
        dh, n2 = pre_norm_backward(self.norm, dn2, saved.h, saved.rstd, residual)
        return dh, [*self.gate_up.gradients(d_gate_up, n2, gate_up.xa, d_xa, pass_ctx.gate_up), *d_down]
