"""Gradients of the parameters that train: cleared without a walk over the model, and restored after half a pass."""

from typing import Any

import torch


def trainable_weights(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Returns names and weights of the parameters that train."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


class FastTrainMode:
    """Replacement of `model.train` that walks over the modules only if the mode changes.

    The loop calls it for every batch, and a walk over two thousand modules keeps the GPU waiting.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._switch = model, model.train

    def __call__(self, mode: bool = True) -> Any:
        return self._model if self._model.training == mode else self._switch(mode)


class FastZeroGrad:
    """Replacement of `model.zero_grad` that knows the trainable parameters, so it walks over no modules."""

    def __init__(self, model: Any) -> None:
        self._parameters = [weight for _, weight in trainable_weights(model)]

    def __call__(self, set_to_none: bool = True) -> None:
        # None rather than zeros, whatever is asked for: the first backward pass then writes and does not add.
        for parameter in self._parameters:
            parameter.grad = None


class AccumulatedGradients:
    """Copy of the gradients that the passes of a step have accumulated, so that half a pass leaves no trace.

    Copying takes one launch, and 2 bytes for each adapter parameter (bf16). A step's first pass costs nothing: there
    are no gradients yet.
    """

    def __init__(self, model: Any) -> None:
        self._parameters = [weight for _, weight in trainable_weights(model)]
        self._copies: list[torch.Tensor] = []

    def save(self) -> list[torch.Tensor | None]:
        """Copies the gradients; returns the gradient tensors themselves, for `restore`."""
        found = [parameter.grad for parameter in self._parameters]
        if any(gradient is not None for gradient in found):
            # The buffers are made once and reused by every later pass.
            self._copies = self._copies or [torch.empty_like(parameter.data) for parameter in self._parameters]
            pairs = [
                (copy, gradient) for copy, gradient in zip(self._copies, found, strict=True) if gradient is not None
            ]
            torch._foreach_copy_([copy for copy, _ in pairs], [gradient for _, gradient in pairs])
        return found

    def restore(self, found: list[torch.Tensor | None]) -> None:
        """Makes the gradients what they were when `save` returned `found`."""
        for index, (parameter, gradient) in enumerate(zip(self._parameters, found, strict=True)):
            parameter.grad = None if gradient is None else gradient.copy_(self._copies[index])
