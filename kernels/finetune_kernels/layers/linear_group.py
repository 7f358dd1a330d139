"""Frozen linear layers that read the same input, with their LoRA adapters, as one: q, k, v; gate, up; or one alone.

    y  = x W^T + bias, y_i += scale_i (x A_i^T) B_i^T      W [out, in]: the layers' weights on top of each other
    dx = dy W + d A,   d_i = scale_i dy_i B_i              A [R, in]: their A's on top of each other
    dA_i = d_i^T x,    dB_i = scale_i dy_i^T (x A_i^T)

x is read once for all adapters, x A^T is saved, d is made once, and the products themselves add the adapters' part
(beta = 1). W is a `FrozenWeight`. `lora_pass` says what dropout and DoRA change in these formulas.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finetune_kernels.layers.adapters import AdapterStack, lay_out_adapters
from finetune_kernels.layers.frozen_weight import FrozenWeight
from finetune_kernels.layers.lora_pass import PLAIN, WHOLE, DoraOutputs, DroppedInputs, LoraPass, WholeInputs
from finetune_kernels.ops.adapted_activation import MAX_RANK
from finetune_kernels.primitives import dora
from finetune_kernels.primitives.adapter_dropout import DropoutSeed, Mask
from finetune_kernels.primitives.lora_delta import LoraDelta


def reference(linears: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
    """The layers one by one, side by side: x [T, in] -> [T, out]."""
    return torch.cat([linear(x) for linear in linears], dim=-1)


class LinearGroup:
    """The layers `linears` (peft's LoRA layers, or plain ones) as one.

    `keep_dequantized`: W is kept in the compute type. `philox_stream`: the dropout stream of the first linear; each
    further linear takes the next number. `factors`: a factor of each layer's output (Falcon H1's gate), which has no
    bias and no DoRA then.
    """

    def __init__(
        self, linears: Sequence[Any], dtype: torch.dtype, *, keep_dequantized: bool, philox_stream: int = 0,
        factors: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self._bases = [getattr(linear, "base_layer", linear) for linear in linears]
        self.dtype = dtype
        """The compute type."""
        self.frozen = FrozenWeight(self._bases, dtype, keep_dequantized=keep_dequantized)
        self.bias = self._merge_biases()

        self._adapters = lay_out_adapters(linears, philox_stream)
        self._stack = AdapterStack(self._adapters, dtype)
        self._dropouts = [adapter.dropout for adapter in self._adapters if isinstance(adapter.dropout, nn.Dropout)]
        self.fuses_into_activation = all(adapter.a.shape[0] <= MAX_RANK for adapter in self._adapters)
        """True if `adapted_activation` can add the adapters' part: no rank is over 64."""

        has_magnitudes = any(adapter.magnitude is not None for adapter in self._adapters)
        self._squares = dora.row_squares(self.frozen.tensor()) if has_magnitudes else None
        self._constants = self._spread(factors)

    def _spread(self, factors: Sequence[float]) -> dora.DoraScales | None:
        """The factors for each output; None if all are 1."""
        if all(factor == 1 for factor in factors):
            return None
        parts = [torch.full((size,), factor) for size, factor in zip(self.frozen.sizes, factors, strict=True)]
        each = torch.cat(parts).to(self._bases[0].weight.device)
        return dora.DoraScales(each, torch.ones_like(each))

    def _merge_biases(self) -> torch.Tensor | None:
        """The layers' biases [out] side by side, zeros for a layer that has none; None if no layer has one."""
        if all(base.bias is None for base in self._bases):
            return None

        device = self._bases[0].weight.device
        parts = [
            torch.zeros(size, device=device) if base.bias is None else base.bias.detach()
            for base, size in zip(self._bases, self.frozen.sizes, strict=True)
        ]
        return torch.cat([part.to(self.dtype) for part in parts])

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' parameters, in the order of `gradients`."""
        return self._stack.parameters

    def a(self) -> torch.Tensor:
        """A [R, in] in the compute type."""
        return self._stack.a()

    @property
    def drops(self) -> bool:
        """True if any adapter drops a part of its input now."""
        return any(dropout.training for dropout in self._dropouts)

    def begin(self, seed: DropoutSeed | None) -> LoraPass:
        """Returns a new pass, with dropout masks of `seed` if adapters drop now."""
        inputs: WholeInputs | DroppedInputs = WHOLE
        if seed is not None and self.drops:
            inputs = DroppedInputs(tuple(Mask(seed, adapter.philox_stream, adapter.p) for adapter in self._adapters))
        if self._squares is not None:
            return LoraPass(inputs, DoraOutputs(self._scales(self._squares)))
        return LoraPass(inputs, PLAIN if self._constants is None else DoraOutputs(self._constants))

    def _scales(self, squares: torch.Tensor) -> dora.DoraScales:
        """DoRA's factors and norms [out] for the adapters' weights of now; `squares`: |W|^2 of each row."""
        w, norms = self.frozen.tensor(), torch.ones_like(squares)  # [out, in], [out]
        factor = torch.ones_like(norms)  # stays 1 for a layer without magnitudes

        for adapter in self._adapters:
            if adapter.magnitude is not None:
                a, b, at = adapter.a.to(self.dtype), adapter.b.to(self.dtype), adapter.outputs
                norms[at] = dora.row_norms(w[at], squares[at], a, b, adapter.scale)
                factor[at] = adapter.magnitude.detach() / norms[at]

        return dora.DoraScales(factor, norms)

    def xa(self, x: torch.Tensor, pass_ctx: LoraPass) -> torch.Tensor:
        """x [T, in] -> x A^T [T, R]."""
        return pass_ctx.inputs.xa(self._stack, x)

    def base(self, x: torch.Tensor, pass_ctx: LoraPass) -> torch.Tensor:
        """x [T, in] -> g x W^T + bias [T, out]: y without the adapters' part."""
        return pass_ctx.outputs.base(self.frozen, x, self.bias)

    def forward(self, x: torch.Tensor, pass_ctx: LoraPass) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, in] -> y [T, out] and x A^T [T, R]."""
        xa = self.xa(x, pass_ctx)
        y = self.base(x, pass_ctx)

        for adapter in self._adapters:
            b = pass_ctx.outputs.b(adapter, self.dtype)  # [out of this adapter, r]
            y[:, adapter.outputs].addmm_(xa[:, adapter.ranks], b.T, alpha=adapter.scale)

        return y, xa

    def lora_deltas(self, xa: torch.Tensor, pass_ctx: LoraPass, *, parts: int) -> list[LoraDelta | None]:
        """LoRA deltas of gate and of up (the two halves of y), or of up alone (`parts`: 1) for the activation's kernel,
        from xa [T, R].

        None where there is no adapter, or where `forward` has added its part because a rank is too large.
        """
        size = sum(self.frozen.sizes) // parts  # F
        found: list[LoraDelta | None] = [None] * parts
        for adapter in self._adapters if self.fuses_into_activation else ():
            b, xa_part = pass_ctx.outputs.b(adapter, self.dtype), xa[:, adapter.ranks]
            for index in range(parts):
                # Phi-3's one adapter covers both halves.
                if adapter.outputs.start <= index * size and adapter.outputs.stop >= (index + 1) * size:
                    first = index * size - adapter.outputs.start
                    found[index] = LoraDelta(xa_part, b[first : first + size], adapter.scale)

        return found

    def d_xa(self, dy: torch.Tensor, pass_ctx: LoraPass) -> torch.Tensor:
        """dy [T, out] -> d, the gradient of x A^T [T, R]."""
        d_xa = dy.new_empty(dy.shape[0], self._stack.ranks)

        for adapter in self._adapters:
            # The scale goes onto B, which is smaller than dy.
            b = _scaled(pass_ctx.outputs.b(adapter, self.dtype), adapter.scale)
            torch.mm(dy[:, adapter.outputs], b, out=d_xa[:, adapter.ranks])

        return d_xa

    def backward_base(self, dy: torch.Tensor, pass_ctx: LoraPass) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [T, out] -> g dy W [T, in], to which d A is still to be added, and d [T, R]."""
        return self.frozen.backward(pass_ctx.outputs.d_base(dy)), self.d_xa(dy, pass_ctx)

    def add_lora_dx(self, dx: torch.Tensor, d_xa: torch.Tensor, pass_ctx: LoraPass) -> torch.Tensor:
        """dx [T, in] += d A, in place; d_xa [T, R]."""
        return pass_ctx.inputs.add_dx(self._stack, dx, d_xa)

    def backward(self, dy: torch.Tensor, pass_ctx: LoraPass) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [T, out] -> dx [T, in] and d [T, R]."""
        dx, d_xa = self.backward_base(dy, pass_ctx)
        return self.add_lora_dx(dx, d_xa, pass_ctx), d_xa

    def gradients(
        self, dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, d_xa: torch.Tensor, pass_ctx: LoraPass
    ) -> list[torch.Tensor]:
        """Gradients of `parameters`, in their types: dy [T, out], x [T, in], xa and d_xa [T, R]."""
        if not self._adapters:
            return []

        # One product reads dy once for all adapters; of [out, R], each adapter's own block is used.
        every_db = dy.T @ xa
        found = []
        for adapter, da in zip(self._adapters, pass_ctx.inputs.da(self._stack, x, d_xa), strict=True):
            db = _scaled(every_db[adapter.outputs, adapter.ranks], adapter.scale)
            db = pass_ctx.outputs.db(adapter, db)
            found += [da.to(adapter.a.dtype), db.to(adapter.b.dtype)]
            found += pass_ctx.outputs.dm(adapter, dy, x, xa, self.frozen)
        return found


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1 else x * scale
