"""Every step is looked at: on a CPU at once, on a GPU when its numbers have arrived, and without a wait for them."""

import math

import pytest
import torch

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.training.divergence.step_watch import MAX_SKIPPED_STEPS, StepWatch

BAD: dict[str, tuple[tuple[float, ...], float, str]] = {
    "a loss that is NaN": ((1.0, math.nan), 1.0, "the loss is nan at step 7"),
    "a loss that is infinite": ((math.inf,), 1.0, "the loss is inf at step 7"),
    "a norm that is NaN": ((1.0,), math.nan, "the gradient's norm is nan at step 7"),
    "a norm that is infinite": ((1.0,), math.inf, "the gradient's norm is inf at step 7"),
    "no gradient": ((1.0,), 0.0, "the gradient is zero at step 7"),
}


def take(watch: StepWatch, step: int, losses: tuple[float, ...], norm: float, device: str = "cpu") -> None:
    for loss in losses:
        watch.add_loss(torch.tensor(loss, device=device))
    watch.end_step(step, torch.tensor(norm, device=device))


@pytest.mark.parametrize(("losses", "norm", "message"), BAD.values(), ids=BAD)
def test_a_step_that_is_no_number_ends_the_run(losses: tuple[float, ...], norm: float, message: str) -> None:
    watch = StepWatch()
    take(watch, 6, (1.0, 2.0), 0.5)
    with pytest.raises(TrainerError, match=message) as raised:
        take(watch, 7, losses, norm)
    assert raised.value.reason is FailureReason.NON_FINITE_LOSS


def test_losses_of_one_step_do_not_count_in_the_next() -> None:
    watch = StepWatch()
    with pytest.raises(TrainerError):
        take(watch, 1, (math.nan,), 1.0)
    take(watch, 2, (1.0,), 1.0)


def test_steps_that_loss_scaling_skips_are_no_failure_until_there_are_too_many() -> None:
    watch = StepWatch()
    watch.scales_loss = True
    for step in range(MAX_SKIPPED_STEPS):
        take(watch, step, (1.0,), math.inf)
    take(watch, 50, (1.0,), 1.0)
    for step in range(MAX_SKIPPED_STEPS):
        take(watch, 51 + step, (1.0,), math.nan)
    with pytest.raises(TrainerError, match="at step 99"):
        take(watch, 99, (1.0,), math.inf)


@pytest.mark.gpu
@pytest.mark.parametrize(("losses", "norm", "message"), BAD.values(), ids=BAD)
def test_a_gpu_is_not_waited_for(losses: tuple[float, ...], norm: float, message: str) -> None:
    take(StepWatch(), 1, (1.0, 1.0), 1.0, "cuda")  # loading a kernel takes as long as the GPU is kept busy below
    watch = StepWatch()
    watch._free += [torch.empty(2, pin_memory=True) for _ in range(2)]  # allocating may wait for the GPU
    bad, good = torch.tensor(losses, device="cuda"), torch.tensor(1.0, device="cuda")
    last = torch.tensor(norm, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)  # the GPU is busy with earlier work
        for loss in bad:
            watch.add_loss(loss)
        watch.end_step(7, last)  # nothing has arrived, so nothing is raised
        watch.add_loss(good)
        watch.end_step(8, good)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(TrainerError, match=message):
        watch.catch_up()


@pytest.mark.gpu
def test_a_number_that_has_arrived_is_looked_at_in_the_next_step() -> None:
    watch = StepWatch()

    def two_steps() -> None:
        take(watch, 1, (math.nan,), 1.0, "cuda")  # it may arrive within the step itself
        torch.cuda.synchronize()
        take(watch, 2, (1.0,), 1.0, "cuda")

    with pytest.raises(TrainerError, match="the loss is nan at step 1"):
        two_steps()
