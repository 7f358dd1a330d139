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

from finetune_kernels.layers.adapters import PLAIN, Adapter, GroupPass, place
from finetune_kernels.layers.frozen_weight import FrozenWeight
from finetune_kernels.ops.adapted_activation import LARGEST_RANK, Share
from finetune_kernels.primitives import adapter_dropout, dora
from finetune_kernels.primitives.adapter_dropout import Draw, Mask


def reference(linears: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
    """The layers one by one, side by side: x [T, in] -> [T, out]."""
    return torch.cat([linear(x) for linear in linears], dim=-1)


class LinearGroup:
    """The layers `linears` (peft's LoRA layers, or plain ones) as one; `resident` keeps W decoded; `stream` and the
    numbers after it are the linears' masks' own."""

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype, *, resident: bool, stream: int = 0) -> None:
        self._bases = [getattr(linear, "base_layer", linear) for linear in linears]
        self._dtype = dtype
        self.frozen = FrozenWeight(self._bases, dtype, resident=resident)
        self._adapters = place(linears, stream)
        self._dropouts = [adapter.dropout for adapter in self._adapters if isinstance(adapter.dropout, nn.Dropout)]
        self._has_magnitudes = any(adapter.magnitude is not None for adapter in self._adapters)
        self._ranks = self._adapters[-1].ranks.stop if self._adapters else 0
        self.is_small = all(adapter.a.shape[0] <= LARGEST_RANK for adapter in self._adapters)
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

    def begin(self, draw: Draw | None) -> GroupPass:
        """What a pass with the masks of `draw` is made with."""
        masks: tuple[Mask, ...] = ()
        if draw is not None and self.drops:
            masks = tuple(Mask(draw, adapter.stream, adapter.p) for adapter in self._adapters)
        return GroupPass(masks, self._scales()) if masks or self._has_magnitudes else PLAIN

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

    def inner(self, x: torch.Tensor, now: GroupPass) -> torch.Tensor:
        """x A^T [T, R]."""
        if not now.masks:
            return x @ self.a().T if self._adapters else x.new_empty(x.shape[0], 0)
        found = x.new_empty(x.shape[0], self._ranks)
        for adapter, mask in zip(self._adapters, now.masks, strict=True):
            a = adapter.a.to(self._dtype)
            torch.mm(adapter_dropout.drop(x, mask), a.T, out=found[:, adapter.ranks])
        return found

    def base(self, x: torch.Tensor, now: GroupPass) -> torch.Tensor:
        """x [T, in] -> g x W^T + bias [T, out]: y without the adapters' shares."""
        if now.scales is None:
            return self.frozen.forward(x, self.bias)
        y = self.frozen.forward(x, None).mul_(now.scales.factor)
        return y if self.bias is None else y.add_(self.bias)

    def _b(self, adapter: Adapter, now: GroupPass) -> torch.Tensor:
        """g B [out, r] of one adapter, in the compute type."""
        if now.scales is None:
            return adapter.b.to(self._dtype)
        return (adapter.b * now.scales.factor[adapter.outputs].unsqueeze(1)).to(self._dtype)

    def shares(self, inner: torch.Tensor, now: GroupPass) -> tuple[Share | None, Share | None]:
        """What small adapters add to the first and to the second half of y."""
        half = sum(self.frozen.sizes) // 2
        found: list[Share | None] = [None, None]
        for adapter in self._adapters if self.is_small else ():
            b, i = self._b(adapter, now), inner[:, adapter.ranks]
            for index in (0, 1):
                if adapter.outputs.start <= index * half and adapter.outputs.stop >= (index + 1) * half:
                    first = index * half - adapter.outputs.start
                    found[index] = Share(i, b[first : first + half], adapter.scale)
        return found[0], found[1]

    def forward(self, x: torch.Tensor, now: GroupPass) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, in] -> y [T, out] and x A^T [T, R]."""
        inner = self.inner(x, now)
        y = self.base(x, now)
        for adapter in self._adapters:
            b = self._b(adapter, now)
            y[:, adapter.outputs].addmm_(inner[:, adapter.ranks], b.T, alpha=adapter.scale)
        return y, inner

    def d_inner(self, dy: torch.Tensor, now: GroupPass) -> torch.Tensor:
        """dy [T, out] -> d [T, R]."""
        found = dy.new_empty(dy.shape[0], self._ranks)
        for adapter in self._adapters:
            b = _scaled(self._b(adapter, now), adapter.scale)
            torch.mm(dy[:, adapter.outputs], b, out=found[:, adapter.ranks])
        return found

    def backward_base(self, dy: torch.Tensor, now: GroupPass) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [T, out] -> g dy W [T, in], which lacks d A, and d [T, R]."""
        scaled = dy if now.scales is None else torch.mul(dy, now.scales.factor, out=torch.empty_like(dy))
        return self.frozen.backward(scaled), self.d_inner(dy, now)

    def add_shares(self, dx: torch.Tensor, d_inner: torch.Tensor, now: GroupPass) -> torch.Tensor:
        """dx + d A, in place."""
        if not now.masks:
            return dx.addmm_(d_inner, self.a()) if self._adapters else dx
        for adapter, mask in zip(self._adapters, now.masks, strict=True):
            adapter_dropout.add_share(dx, d_inner[:, adapter.ranks], adapter.a.to(self._dtype), mask)
        return dx

    def backward(self, dy: torch.Tensor, now: GroupPass) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [T, out] -> dx [T, in] and d [T, R]."""
        dx, d_inner = self.backward_base(dy, now)
        return self.add_shares(dx, d_inner, now), d_inner

    def gradients(
        self, dy: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, d_inner: torch.Tensor, now: GroupPass
    ) -> list[torch.Tensor]:
        """Gradients of `parameters`, in their types."""
        if not self._adapters:
            return []
        found = []
        every = dy.T @ inner  # reads dy once; of each adapter's outputs by the others' ranks nothing is used
        for adapter, da in zip(self._adapters, self._of_a(x, d_inner, now), strict=True):
            db = _scaled(every[adapter.outputs, adapter.ranks], adapter.scale)
            if now.scales is not None:
                db = db * now.scales.factor[adapter.outputs].unsqueeze(1)
            found += [da.to(adapter.a.dtype), db.to(adapter.b.dtype)]
            if adapter.magnitude is not None:
                found.append(self._of_magnitude(adapter, dy, x, inner, now))
        return found

    def _of_magnitude(
        self, adapter: Adapter, dy: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, now: GroupPass
    ) -> torch.Tensor:
        assert adapter.magnitude is not None
        assert now.scales is not None
        at, b = adapter.outputs, adapter.b.to(self._dtype)
        found = dora.magnitude_gradient(
            dy[:, at], x, self.frozen.tensor()[at], inner[:, adapter.ranks], b, adapter.scale, now.scales.norms[at]
        )
        return found.to(adapter.magnitude.dtype)

    def _of_a(self, x: torch.Tensor, d_inner: torch.Tensor, now: GroupPass) -> list[torch.Tensor]:
        """Gradients of the adapters' A."""
        if not now.masks:
            whole = d_inner.T @ x
            return [whole[adapter.ranks] for adapter in self._adapters]
        return [
            d_inner[:, adapter.ranks].T @ adapter_dropout.drop(x, mask)
            for adapter, mask in zip(self._adapters, now.masks, strict=True)
        ]


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1 else x * scale
