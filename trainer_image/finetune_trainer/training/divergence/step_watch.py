"""Sees at every step whether the loss and the gradient's norm are numbers, and whether the loss has exploded, without
making the CPU wait for the GPU.

Reading a number from the GPU makes the CPU wait for all that was launched before, and the GPU then waits for the CPU.
So each step's two numbers are copied into page-locked host memory behind the step's own kernels, and looked at when
the copy has arrived: usually one step late. Before a checkpoint, a sample and the end, `catch_up` waits for the rest.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.training.divergence.loss_history import LossHistory

MAX_SKIPPED_STEPS = 24
"""Overflows in succession that loss scaling explains: it begins at 2^16 and halves each time, down to 2^-8 here."""
BEYOND_FP16 = (
    ": the run computes in FP16, which ends at 65,504; if the model goes beyond, write spec.training.precision: FP32, "
    "or choose a card that has BF16 (Ampere or later)"
)


@dataclass(frozen=True)
class _Arrival:
    """Two numbers of a step on their way to the CPU."""

    step: int
    numbers: torch.Tensor  # [2]: loss, gradient norm; fp32, page-locked
    event: Any
    """torch.cuda.Event, whose methods have no types."""


class StepWatch:
    """Watches the steps of one process."""

    def __init__(self) -> None:
        self.scales_loss = False
        """True for fp16: a step whose scaled gradients overflow is skipped there, which is no error."""
        self.history = LossHistory()
        self._skipped = 0
        self._loss: torch.Tensor | None = None
        self._arriving: deque[_Arrival] = deque()
        self._free: list[torch.Tensor] = []  # page-locked memory is slow to allocate, so it is used again

    def add_loss(self, loss: torch.Tensor) -> None:
        """Adds the loss of one pass of the current step (a scalar)."""
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def reduce_loss(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces the loss of the current step by `reduce` of it: the sum over the run's processes."""
        if self._loss is not None:
            self._loss = reduce(self._loss.clone())

    def end_step(self, step: int, norm: torch.Tensor) -> None:
        """Takes the norm of the step's gradients, before the optimiser uses them; `step` counts from 1.

        Raises TrainerError (NonFiniteLoss, LossDiverged) for an earlier step, and on a CPU for this one.
        """
        loss, self._loss = self._loss if self._loss is not None else torch.zeros_like(norm), None
        numbers = torch.stack([loss.float(), norm.to(loss.device, torch.float32, non_blocking=True)])  # [2]
        if numbers.device.type != "cuda":
            self._judge(step, numbers)
            return

        host = self._free.pop() if self._free else torch.empty(2, dtype=torch.float32, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._arriving.append(_Arrival(step, host, event))

        while self._arriving and self._arriving[0].event.query():
            self._judge_first()

    def catch_up(self) -> None:
        """Waits for the steps that were not looked at yet. Raises TrainerError (NonFiniteLoss, LossDiverged)."""
        while self._arriving:
            self._arriving[0].event.synchronize()
            self._judge_first()

    def finish(self, step: int) -> None:
        """Judges the end of the training, after `step` steps. Raises TrainerError (NonFiniteLoss, LossDiverged)."""
        self.catch_up()
        if (found := self.history.judge_end(step)) is not None:
            raise TrainerError(FailureReason.LOSS_DIVERGED, found)

    def _judge_first(self) -> None:
        arrived = self._arriving.popleft()
        self._judge(arrived.step, arrived.numbers)
        self._free.append(arrived.numbers)

    def _judge(self, step: int, numbers: torch.Tensor) -> None:
        """Raises TrainerError for a loss or norm that is no number, a zero gradient, and a loss that has exploded."""
        loss, norm = numbers.tolist()
        if not math.isfinite(loss):
            cause = BEYOND_FP16 if self.scales_loss else ""
            raise TrainerError(FailureReason.NON_FINITE_LOSS, f"the loss is {loss} at step {step}{cause}")

        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if self._skipped > (MAX_SKIPPED_STEPS if self.scales_loss else 0):
            raise TrainerError(FailureReason.NON_FINITE_LOSS, f"the gradient's norm is {norm} at step {step}")

        # After a divergence the loss can stay finite while nothing is learned.
        if norm == 0.0:
            cause = "training has diverged, or there is nothing to learn"
            raise TrainerError(FailureReason.NON_FINITE_LOSS, f"the gradient is zero at step {step}: {cause}")
        if (found := self.history.add(step, loss)) is not None:
            raise TrainerError(FailureReason.LOSS_DIVERGED, found)
