"""The learning rate: above 0 from the first step on, at its peak in every run, the same after a stop."""

import math
from typing import Any

import pytest
import torch
from transformers.optimization import get_scheduler
from trl.trainer.sft_config import SFTConfig

from finetune_api.spec.training import resolve_warmup
from finetune_trainer.stages.training_configuration import CHECKPOINTING
from finetune_trainer.training.optimizer import create_schedule, rate_factor

KINDS = ("linear", "cosine", "constant")
PEAK = 0.5

WARMUPS: dict[str, tuple[int | None, int, int]] = {
    "one step": (None, 1, 0),
    "nine steps": (None, 9, 0),
    "a tenth": (None, 30, 3),
    "at most five": (None, 1000, 5),
    "as written": (40, 50, 40),
    "none at all": (0, 1000, 0),
    "as long as the run": (50, 50, 5),
    "longer than the run": (100, 3, 0),
}


@pytest.mark.parametrize(("written", "steps", "expected"), WARMUPS.values(), ids=WARMUPS)
def test_warm_up_is_shorter_than_the_run(written: int | None, steps: int, expected: int) -> None:
    assert resolve_warmup(written, steps) == expected < steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("written", [None, 0, 3, 5, 100])
def test_every_step_learns_and_one_at_the_peak(kind: str, written: int | None) -> None:
    for steps in (1, 2, 3, 5, 8, 10, 60):
        warmup = resolve_warmup(written, steps)
        factors = [rate_factor(kind, step, steps=steps, warmup=warmup) for step in range(steps)]
        assert min(factors) > 0, (steps, factors)
        assert max(factors) == factors[warmup] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_after_warm_up_the_rate_is_that_of_transformers(kind: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, torch.optim.SGD([parameter], lr=1.0), num_warmup_steps=5, num_training_steps=20)
    for step in range(20):
        expected = theirs.get_last_lr()[0]
        found = rate_factor(kind, step, steps=20, warmup=5)
        assert found == pytest.approx(expected) if step >= 5 else found > expected, step
        theirs.optimizer.step()
        theirs.step()


def schedule(kind: str, warmup: int | None, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    options: dict[str, Any] = {CHECKPOINTING: False, "lr_scheduler_kwargs": {"warmup_steps": warmup}}
    arguments = SFTConfig(learning_rate=PEAK, lr_scheduler_type=kind, use_cpu=True, **options)
    return create_schedule(arguments, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK), steps)


def rates(made: torch.optim.lr_scheduler.LambdaLR, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(made.get_last_lr()[0])
        made.optimizer.step()
        made.step()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stopped_after", [1, 3, 7])
def test_a_resumed_schedule_goes_on_where_it_was(kind: str, stopped_after: int) -> None:
    whole = rates(schedule(kind, 4, 12), 12)
    first = schedule(kind, 4, 12)
    before = rates(first, stopped_after)
    second = schedule(kind, 4, 12)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert before + rates(second, 12 - stopped_after) == whole
    assert math.isclose(whole[0], PEAK / 5)


def test_a_warm_up_that_cannot_be_is_said(caplog: pytest.LogCaptureFixture) -> None:
    schedule("linear", 100, 50)
    assert "warmupSteps: 100 is not below the run's 50 steps: the warm-up is 5 steps" in caplog.text
    caplog.clear()
    schedule("linear", 49, 50)
    assert not caplog.text
