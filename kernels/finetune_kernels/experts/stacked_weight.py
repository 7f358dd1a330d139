"""The frozen weights of all experts of a layer, W [E, out, in]: as loaded, or in NF4 and decoded where used."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import nn

from finetune_kernels.primitives.nf4_stack import Nf4Stack


class StackedWeight(nn.Module):
    """W [E, out, in]; its tensors are buffers that no checkpoint holds."""

    def __init__(self, weights: Nf4Stack | torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.shape: tuple[int, int, int] = tuple(weights.shape)  # type: ignore[assignment]  # three sizes
        self.is_quantized = isinstance(weights, Nf4Stack)
        self._decoded: dict[torch.dtype, torch.Tensor] | None = None
        tensors = weights.tensors() if isinstance(weights, Nf4Stack) else {"whole": weights.detach()}
        for name, tensor in tensors.items():
            self.register_buffer(f"weight_{name}", tensor, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @classmethod
    def of_parameter(cls, parameter: torch.Tensor, bias: torch.Tensor | None, *, is_transposed: bool) -> Self:
        """The weights of transformers' parameter: stacked as `[E, out, in]`, or `[E, in, out]` if `is_transposed`.

        A parameter that was quantised when it was loaded has its stack beside it, as [out, in] already.
        """
        stack: Nf4Stack | None = getattr(parameter, "nf4_stack", None)
        if stack is not None:
            return cls(stack, bias)
        return cls(parameter.transpose(1, 2).contiguous() if is_transposed else parameter, bias)

    @property
    def parameters_count(self) -> int:
        """Number of weights and biases."""
        experts, rows, columns = self.shape
        bias = self.bias
        return experts * rows * columns + (bias.numel() if isinstance(bias, torch.Tensor) else 0)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.buffers())

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.buffers()).device

    def stack(self) -> Nf4Stack:
        """The weights in NF4."""
        tensors = {name.removeprefix("weight_"): value for name, value in self.named_buffers() if name != "bias"}
        return Nf4Stack(self.shape, **tensors)

    @contextmanager
    def dequantized(self) -> Iterator[None]:
        """Dequantises W once for all products inside, and releases it afterwards."""
        self._decoded = {}
        try:
            yield
        finally:
            self._decoded = None

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """W [E, out, in] in `dtype`."""
        if not self.is_quantized:
            whole = self.weight_whole
            assert isinstance(whole, torch.Tensor)
            return whole.to(dtype)

        found = None if self._decoded is None else self._decoded.get(dtype)
        if found is None:
            found = self.stack().dequantize(dtype)
        if self._decoded is not None:
            self._decoded[dtype] = found
        return found
