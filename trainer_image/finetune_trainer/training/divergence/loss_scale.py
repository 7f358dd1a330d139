"""Loss scaling for fp16, over the optimiser's one gradient of all parameters.

fp16 ends at 6e-8 and at 65,504. Gradients of activations are mostly small, so the loss is multiplied by a scale before
backward, and the gradient divided by it after, in fp32. A gradient that is infinite or NaN shows that the scale is too
large: that step is left out, and the scale halved. After many good steps it is doubled again.

transformers' loop and accelerate take it for PyTorch's GradScaler, whose place it has: that one looks at each process's
own gradients, so that of several processes some would leave a step out and others make it. Here the norm is judged
that all processes have in common. It is part of a checkpoint (scaler.pt).

Source: Micikevicius et al., "Mixed Precision Training", 2018, section 3.2.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from finetune_kernels.primitives.multi_tensor_adamw import MultiTensorAdamW

log = logging.getLogger(__name__)
FIRST_SCALE, SMALLEST_SCALE, LARGEST_SCALE = 2.0**16, 2.0**-8, 2.0**24
GOOD_STEPS = 500
"""Steps without an overflow after which the scale is doubled: at most one step in 500 is lost to the attempt."""


class LossScale:
    """The scale of one run, which all processes have alike."""

    def __init__(self) -> None:
        self.value = FIRST_SCALE
        self._good_steps = 0
        self._norm: torch.Tensor | None = None

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns the loss that backward is to begin with."""
        return loss * self.value

    def take_norm(self, norm: torch.Tensor) -> None:
        """Takes the norm of a step's gradient (scalar), in which infinity and NaN show."""
        self._norm = norm

    def step(self, optimizer: MultiTensorAdamW, closure: Any = None) -> None:
        """Makes the optimiser's step, or leaves it out after an overflow."""
        if self._overflows:
            optimizer.drop_gradients()
        else:
            optimizer.step()

    def update(self) -> None:
        """Adapts the scale to what the step has shown."""
        overflows, self._norm = self._overflows, None
        self._good_steps = 0 if overflows else self._good_steps + 1
        if overflows:
            self.value = max(SMALLEST_SCALE, self.value / 2)
            log.info("a gradient overflows in fp16: the step is left out, and the loss's scale is now %g", self.value)
        elif self._good_steps == GOOD_STEPS:
            self._good_steps, self.value = 0, min(LARGEST_SCALE, self.value * 2)

    def state_dict(self) -> dict[str, float]:
        """Returns what a checkpoint keeps."""
        return {"scale": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`. Of a checkpoint by PyTorch's GradScaler it takes the scale."""
        self.value, self._good_steps = float(state["scale"]), int(state.get("good_steps", 0))

    @property
    def _overflows(self) -> bool:
        """True if the step's gradient is no number; waits for the GPU."""
        assert self._norm is not None
        return not bool(torch.isfinite(self._norm))


def clip_scaled(
    optimizer: MultiTensorAdamW, max_norm: float, reduce: Callable[[torch.Tensor], torch.Tensor],
    scale: LossScale | None,
) -> torch.Tensor:  # fmt: skip
    """Clips a step's gradients as `MultiTensorAdamW.clip_gradients` does, and returns their norm; `scale`, if the loss
    has one, learns of the norm."""
    if scale is None:
        return optimizer.clip_gradients(max_norm, reduce)

    norm = optimizer.clip_gradients(max_norm, reduce, scale.value)
    scale.take_norm(norm)
    return norm
