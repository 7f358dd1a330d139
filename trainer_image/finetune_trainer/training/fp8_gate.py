"""Decides for or against FP8, where a job asks for it, by the loss and the gradient of one batch in both precisions.

The gate is asked before the first step and again now and then. On the first batch B is zero, and so is the gradient of
every A: the second look comes early.

A look costs two passes without noise, one of them in bfloat16, and both conversions of the frozen weights: about 2.5
passes in FP8. That is 1.3 % of the steps between two looks where a step is one pass, and 0.3 % where it is four.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.vocabulary import Precision
from finetune_trainer.training.gradients import trainable_weights

EARLY_LOOK, PERIOD = 20, 200
"""Finished steps before the second look, and between those that follow."""


@dataclass(frozen=True)
class Limits:
    """Accepted changes. The loss was measured on an H200: 2.8e-4 (8B, random weights) and 3.7e-3 (four layers that
    learn; at most 6.8e-3 over 200 steps, after which the losses were equal within 3e-3)."""

    loss: float = 0.01
    """Largest change of the loss, relative."""
    cosine: float = 0.99
    """Smallest cosine of the angle between the gradients."""
    norm: float = 0.02
    """Largest change of the gradient's norm, relative."""


LIMITS = Limits()


@dataclass(frozen=True)
class Fp8Decision:
    """The precision in which frozen weights are multiplied, and the reason, for people."""

    precision: Precision
    reason: str

    @property
    def is_fp8(self) -> bool:
        """True if it is for FP8."""
        return self.precision is Precision.FP8


@dataclass(frozen=True)
class Measured:
    """A batch in one precision."""

    loss: float
    gradient: torch.Tensor
    """Of all weights that train, flat, in their own type [N]."""


def measure(model: Any, loss: Callable[[], torch.Tensor]) -> Measured:
    """Computes a batch in evaluation mode: no dropout, no NEFTune noise. No gradient is left behind, so none may be
    accumulated when it begins."""
    model.eval()
    try:
        found = loss()
        found.backward()  # type: ignore[no-untyped-call]
        parts = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad for _, weight in trainable_weights(model)
        ]
        return Measured(found.item(), torch.cat([part.flatten() for part in parts]))
    finally:
        model.zero_grad()
        model.train()


def decide(step: int, exact: Measured, rounded: Measured) -> Fp8Decision:
    """Decides by a batch in bfloat16 and in FP8, after `step` finished steps."""
    loss = abs(rounded.loss - exact.loss) / max(exact.loss, sys.float_info.min)
    cosine, norm = _compare(exact.gradient.float(), rounded.gradient.float())

    batch = f"a batch after step {step}" if step else "the first batch"
    reason = (
        f"FP8 changes the loss of {batch} by {loss:.2%} (accepted: {LIMITS.loss:.0%}) and its gradient's norm by "
        f"{norm:.2%} ({LIMITS.norm:.0%}); the gradients' cosine is {cosine:.4f} (at least {LIMITS.cosine})"
    )
    # NaN compares as false, so whatever is NaN gives BF16.
    is_accepted = loss <= LIMITS.loss and cosine >= LIMITS.cosine and norm <= LIMITS.norm
    return Fp8Decision(Precision.FP8 if is_accepted else Precision.BF16, reason)


def _compare(exact: torch.Tensor, rounded: torch.Tensor) -> tuple[float, float]:
    """Cosine of the angle between two gradients [N] in fp32, and the relative change of the norm."""
    norms = torch.stack([torch.linalg.vector_norm(exact), torch.linalg.vector_norm(rounded)])
    own, other, product = *norms.tolist(), torch.dot(exact, rounded).item()
    return product / max(own * other, sys.float_info.min), abs(other - own) / max(own, sys.float_info.min)


def next_look(step: int) -> int:
    """Finished steps before the look that follows one after `step` of them."""
    return EARLY_LOOK if step < EARLY_LOOK else (step // PERIOD + 1) * PERIOD
