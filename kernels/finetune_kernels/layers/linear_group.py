"""Frozen linear layers that read the same input, with their LoRA adapters, as one: q, k, v; gate, up; or one alone.

    y  = x W^T + bias, y_i += scale_i (x A_i^T) B_i^T      W [out, in]: the layers' weights on top of each other
    dx = dy W + d A,   d_i = scale_i dy_i B_i              A [R, in]: their A's on top of each other
    dA_i = d_i^T x,    dB_i = scale_i dy_i^T (x A_i^T)

x is read once for all adapters, x A^T is kept, d made once, and the adapters' shares are added by the products
themselves (beta = 1); W is a `FrozenWeight`. Where adapters drop a part of their
inputs (`adapter_dropout`), each has an x of its own in these formulas, made where it is used, and dx gets d_i A_i under
its mask. Where they have magnitudes (`dora`), outputs are multiplied by g, and g B stands for B.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finetune_kernels.layers.adapters import PLAIN, LinearAdapter, LoraPass, lay_out_adapters
from finetune_kernels.layers.frozen_weight import FrozenWeight
from finetune_kernels.ops.adapted_activation import MAX_RANK, LoraDelta
from finetune_kernels.primitives import adapter_dropout, dora
from finetune_kernels.primitives.adapter_dropout import DropoutSeed, Mask


def reference(linears: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
    """The layers one by one, side by side: x [T, in] -> [T, out]."""
    return torch.cat([linear(x) for linear in linears], dim=-1)


class LinearGroup:
    """The layers `linears` (peft's LoRA layers, or plain ones) as one; `keep_dequantized` keeps W decoded;
    `philox_stream` and the numbers after it are the linears' masks' own."""

    def __init__(
        self, linears: Sequence[Any], dtype: torch.dtype, *, keep_dequantized: bool, philox_stream: int = 0
    ) -> None:
        self._bases = [getattr(linear, "base_layer", linear) for linear in linears]
        self._dtype = dtype
        self.frozen = FrozenWeight(self._bases, dtype, keep_dequantized=keep_dequantized)
        self._adapters = lay_out_adapters(linears, philox_stream)
        self._dropouts = [adapter.dropout for adapter in self._adapters if isinstance(adapter.dropout, nn.Dropout)]
        self._has_magnitudes = any(adapter.magnitude is not None for adapter in self._adapters)
        self._ranks = self._adapters[-1].ranks.stop if self._adapters else 0
        self.fuses_into_activation = all(adapter.a.shape[0] <= MAX_RANK for adapter in self._adapters)
        """Whether `adapted_activation` takes the adapters' shares."""
        self.bias = self._merge_biases()
        self._squares = dora.row_squares(self.frozen.tensor()) if self._has_magnitudes else None

    def _merge_biases(self) -> torch.Tensor | None:
        if all(base.bias is None for base in self._bases):
            return None
        device = self._bases[0].weight.device
        parts = [
            torch.zeros(size, device=device) if base.bias is None else base.bias.detach()
            for base, size in zip(self._bases, self.frozen.sizes, strict=True)
        ]
        return torch.cat([part.to(self._dtype) for part in parts])

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Each adapter's in turn: the order of `gradients`."""
        return [parameter for adapter in self._adapters for parameter in adapter.parameters]

    def a(self) -> torch.Tensor:
        """A [R, in] in the compute type."""
        if len(self._adapters) == 1:
            return self._adapters[0].a.to(self._dtype)
        return torch.cat([adapter.a.to(self._dtype) for adapter in self._adapters])

    @property
    def drops(self) -> bool:
        """Whether any adapter drops a part of its input now."""
        return any(dropout.training for dropout in self._dropouts)

    def begin(self, seed: DropoutSeed | None) -> LoraPass:
        """What a pass with the masks of `seed` is made with."""
        masks: tuple[Mask, ...] = ()
        if seed is not None and self.drops:
            masks = tuple(Mask(seed, adapter.philox_stream, adapter.p) for adapter in self._adapters)
        return LoraPass(masks, self._scales()) if masks or self._has_magnitudes else PLAIN

    def _scales(self) -> dora.Scales | None:
        if self._squares is None:
            return None
        w, norms = self.frozen.tensor(), torch.ones_like(self._squares)
        factor = torch.ones_like(norms)
        for adapter in self._adapters:
            if adapter.magnitude is not None:
                a, b, at = adapter.a.to(self._dtype), adapter.b.to(self._dtype), adapter.outputs
                norms[at] = dora.row_norms(w[at], self._squares[at], a, b, adapter.scale)
                factor[at] = adapter.magnitude.detach() / norms[at]
        return dora.Scales(factor, norms)

    def xa(self, x: torch.Tensor, pass_ctx: LoraPass) -> torch.Tensor:
        """x A^T [T, R]."""
        if not pass_ctx.masks:
            return x @ self.a().T if self._adapters else x.new_empty(x.shape[0], 0)
        found = x.new_empty(x.shape[0], self._ranks)
        for adapter, mask in zip(self._adapters, pass_ctx.masks, strict=True):
            a = adapter.a.to(self._dtype)
            torch.mm(adapter_dropout.drop(x, mask), a.T, out=found[:, adapter.ranks])
        return found

    def base(self, x: torch.Tensor, pass_ctx: LoraPass) -> torch.Tensor:
        """x [T, in] -> g x W^T + bias [T, out]: y without the adapters' shares."""
        if pass_ctx.scales is None:
            return self.frozen.forward(x, self.bias)
        y = self.frozen.forward(x, None).mul_(pass_ctx.scales.factor)
        return y if self.bias is None else y.add_(self.bias)

    def _b(self, adapter: LinearAdapter, pass_ctx: LoraPass) -> torch.Tensor:
        """g B [out, r] of one adapter, in the compute type."""
        if pass_ctx.scales is None:
            return adapter.b.to(self._dtype)
        return (adapter.b * pass_ctx.scales.factor[adapter.outputs].unsqueeze(1)).to(self._dtype)

    def lora_deltas(self, xa: torch.Tensor, pass_ctx: LoraPass) -> tuple[LoraDelta | None, LoraDelta | None]:
        """What small adapters add to the first and to the second half of y."""
        half = sum(self.frozen.sizes) // 2
        found: list[LoraDelta | None] = [None, None]
        for adapter in self._adapters if self.fuses_into_activation else ():
            b, i = self._b(adapter, pass_ctx), xa[:, adapter.ranks]
            for index in (0, 1):
                if adapter.outputs.start <= index * half and adapter.outputs.stop >= (index + 1) * half:
                    first = index * half - adapter.outputs.start
                    found[index] = LoraDelta(i, b[first : first + half], adapter.scale)
        return found[0], found[1]

    def forward(self, x: torch.Tensor, pass_ctx: LoraPass) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, in] -> y [T, out] and x A^T [T, R]."""
        xa = self.xa(x, pass_ctx)
        y = self.base(x, pass_ctx)
        for adapter in self._adapters:
            b = self._b(adapter, pass_ctx)
            y[:, adapter.outputs].addmm_(xa[:, adapter.ranks], b.T, alpha=adapter.scale)
        return y, xa

    def d_xa(self, dy: torch.Tensor, pass_ctx: LoraPass) -> torch.Tensor:
        """dy [T, out] -> d [T, R]."""
        found = dy.new_empty(dy.shape[0], self._ranks)
        for adapter in self._adapters:
            b = _scaled(self._b(adapter, pass_ctx), adapter.scale)
            torch.mm(dy[:, adapter.outputs], b, out=found[:, adapter.ranks])
        return found

    def backward_base(self, dy: torch.Tensor, pass_ctx: LoraPass) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [T, out] -> g dy W [T, in], which lacks d A, and d [T, R]."""
        scaled = dy if pass_ctx.scales is None else torch.mul(dy, pass_ctx.scales.factor, out=torch.empty_like(dy))
        return self.frozen.backward(scaled), self.d_xa(dy, pass_ctx)

    def add_lora_dx(self, dx: torch.Tensor, d_xa: torch.Tensor, pass_ctx: LoraPass) -> torch.Tensor:
        """dx + d A, in place."""
        if not pass_ctx.masks:
            return dx.addmm_(d_xa, self.a()) if self._adapters else dx
        for adapter, mask in zip(self._adapters, pass_ctx.masks, strict=True):
            adapter_dropout.add_lora_dx(dx, d_xa[:, adapter.ranks], adapter.a.to(self._dtype), mask)
        return dx

    def backward(self, dy: torch.Tensor, pass_ctx: LoraPass) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [T, out] -> dx [T, in] and d [T, R]."""
        dx, d_xa = self.backward_base(dy, pass_ctx)
        return self.add_lora_dx(dx, d_xa, pass_ctx), d_xa

    def gradients(
        self, dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, d_xa: torch.Tensor, pass_ctx: LoraPass
    ) -> list[torch.Tensor]:
        """Gradients of `parameters`, in their types."""
        if not self._adapters:
            return []
        found = []
        every = dy.T @ xa  # reads dy once; of each adapter's outputs by the others' ranks nothing is used
        for adapter, da in zip(self._adapters, self._of_a(x, d_xa, pass_ctx), strict=True):
            db = _scaled(every[adapter.outputs, adapter.ranks], adapter.scale)
            if pass_ctx.scales is not None:
                db = db * pass_ctx.scales.factor[adapter.outputs].unsqueeze(1)
            found += [da.to(adapter.a.dtype), db.to(adapter.b.dtype)]
            if adapter.magnitude is not None:
                found.append(self._of_magnitude(adapter, dy, x, xa, pass_ctx))
        return found

    def _of_magnitude(
        self, adapter: LinearAdapter, dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, pass_ctx: LoraPass
    ) -> torch.Tensor:
        assert adapter.magnitude is not None
        assert pass_ctx.scales is not None
        at, b = adapter.outputs, adapter.b.to(self._dtype)
        found = dora.magnitude_gradient(
            dy[:, at], x, self.frozen.tensor()[at], xa[:, adapter.ranks], b, adapter.scale, pass_ctx.scales.norms[at]
        )
        return found.to(adapter.magnitude.dtype)

    def _of_a(self, x: torch.Tensor, d_xa: torch.Tensor, pass_ctx: LoraPass) -> list[torch.Tensor]:
        """Gradients of the adapters' A."""
        if not pass_ctx.masks:
            whole = d_xa.T @ x
            return [whole[adapter.ranks] for adapter in self._adapters]
        return [
            d_xa[:, adapter.ranks].T @ adapter_dropout.drop(x, mask)
            for adapter, mask in zip(self._adapters, pass_ctx.masks, strict=True)
        ]


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1 else x * scale
