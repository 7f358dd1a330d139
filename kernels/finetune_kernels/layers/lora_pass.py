"""One pass through a group of adapters: plain LoRA, LoRA with dropout, and DoRA, each in a class that reads alone.

An adapter has two sides, and each side has two kinds. The input side reads x: as it is (`WholeInputs`) or under a
dropout mask of each adapter's own (`DroppedInputs`). The output side adds to y: as it is (`PlainOutputs`) or with the
rows of W + s B A brought to DoRA's magnitudes, g = m / |W + s B A| (`DoraOutputs`).

    input side    x A^T [T, R],  dx += d A,  dA = d^T x
    output side   g x W^T + bias [T, out],  g B,  g dy,  g dB,  dm
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from finetune_kernels.layers.adapters import AdapterStack, LinearAdapter
from finetune_kernels.layers.frozen_weight import FrozenWeight
from finetune_kernels.primitives import adapter_dropout, dora
from finetune_kernels.primitives.adapter_dropout import Mask
from finetune_kernels.primitives.lora_delta import LoraDelta


class WholeInputs:
    """All adapters read x itself, so their A's take part in one product."""

    def xa(self, stack: AdapterStack, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> x A^T [T, R]."""
        return x @ stack.a().T if stack.adapters else x.new_empty(x.shape[0], 0)

    def add_dx(self, stack: AdapterStack, dx: torch.Tensor, d_xa: torch.Tensor) -> torch.Tensor:
        """dx [T, in] += d A, in place; d_xa [T, R]."""
        return dx.addmm_(d_xa, stack.a()) if stack.adapters else dx

    def da(self, stack: AdapterStack, x: torch.Tensor, d_xa: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the A's [r, in], in the compute type."""
        whole = d_xa.T @ x  # [R, in]
        return [whole[adapter.ranks] for adapter in stack.adapters]

    def from_row(self, row: int) -> "WholeInputs":
        """Itself: rows are alike."""
        return self


@dataclass(frozen=True)
class DroppedInputs:
    """Each adapter reads x under its own dropout mask, which is drawn again wherever it is used."""

    masks: tuple[Mask, ...]
    """One for each adapter of the stack."""

    def xa(self, stack: AdapterStack, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> drop(x) A^T [T, R]."""
        xa = x.new_empty(x.shape[0], stack.ranks)

        for adapter, mask in zip(stack.adapters, self.masks, strict=True):
            a = adapter.a.to(stack.dtype)  # [r, in]
            torch.mm(adapter_dropout.drop(x, mask), a.T, out=xa[:, adapter.ranks])

        return xa

    def add_dx(self, stack: AdapterStack, dx: torch.Tensor, d_xa: torch.Tensor) -> torch.Tensor:
        """dx [T, in] += drop(d A), in place; d_xa [T, R]."""
        for adapter, mask in zip(stack.adapters, self.masks, strict=True):
            adapter_dropout.add_lora_dx(dx, d_xa[:, adapter.ranks], adapter.a.to(stack.dtype), mask)

        return dx

    def da(self, stack: AdapterStack, x: torch.Tensor, d_xa: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the A's [r, in], in the compute type."""
        return [
            d_xa[:, adapter.ranks].T @ adapter_dropout.drop(x, mask)
            for adapter, mask in zip(stack.adapters, self.masks, strict=True)
        ]

    def from_row(self, row: int) -> "DroppedInputs":
        """The same masks for a tile that begins at `row`."""
        return DroppedInputs(tuple(mask.from_row(row) for mask in self.masks))


class PlainOutputs:
    """Adapters add to y as they are: g = 1."""

    def base(self, frozen: FrozenWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in] -> x W^T + bias [T, out]."""
        return frozen.forward(x, bias)

    def b(self, adapter: LinearAdapter, dtype: torch.dtype) -> torch.Tensor:
        """B [out, r] in the compute type."""
        return adapter.b.to(dtype)

    def d_base(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [T, out] -> the gradient of x W^T: dy itself."""
        return dy

    def db(self, adapter: LinearAdapter, db: torch.Tensor) -> torch.Tensor:
        """Gradient of B [out, r]: `db` as it is."""
        return db

    def dm(
        self, adapter: LinearAdapter, dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, frozen: FrozenWeight
    ) -> list[torch.Tensor]:
        """Empty: there are no magnitudes."""
        return []


@dataclass(frozen=True)
class DoraOutputs:
    """y is multiplied by g [out], and g B stands for B."""

    scales: dora.DoraScales

    def base(self, frozen: FrozenWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in] -> g x W^T + bias [T, out]."""
        # In place over y, not over W: in bfloat16 a factor within 0.2 % of 1 would leave a weight as it is.
        y = frozen.forward(x, None).mul_(self.scales.factor)
        return y if bias is None else y.add_(bias)

    def b(self, adapter: LinearAdapter, dtype: torch.dtype) -> torch.Tensor:
        """g B [out, r] in the compute type."""
        return (adapter.b * self.scales.factor[adapter.outputs].unsqueeze(1)).to(dtype)

    def d_base(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [T, out] -> the gradient of x W^T: g dy, in the type of dy."""
        return torch.mul(dy, self.scales.factor, out=torch.empty_like(dy))

    def db(self, adapter: LinearAdapter, db: torch.Tensor) -> torch.Tensor:
        """Gradient of B [out, r]: g times that of g B."""
        return db * self.scales.factor[adapter.outputs].unsqueeze(1)

    def dm(
        self, adapter: LinearAdapter, dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, frozen: FrozenWeight
    ) -> list[torch.Tensor]:
        """Gradient of the magnitudes [out of this adapter]; empty if it has none."""
        if adapter.magnitude is None:
            return []

        at, w = adapter.outputs, frozen.tensor()  # W [out, in]
        delta = LoraDelta(xa[:, adapter.ranks], adapter.b.to(w.dtype), adapter.scale)  # without g
        found = dora.magnitude_gradient(dy[:, at], x, w[at], delta, self.scales.norms[at])
        return [found.to(adapter.magnitude.dtype)]


class LoraPass(NamedTuple):
    """Both sides of one pass through a group; forward, recomputation and backward share it."""

    inputs: WholeInputs | DroppedInputs
    outputs: PlainOutputs | DoraOutputs

    @property
    def drops(self) -> bool:
        """True if adapters drop a part of their inputs in this pass."""
        return isinstance(self.inputs, DroppedInputs)

    def from_row(self, row: int) -> "LoraPass":
        """The same pass for a tile that begins at `row`."""
        return LoraPass(self.inputs.from_row(row), self.outputs)


WHOLE, PLAIN = WholeInputs(), PlainOutputs()
