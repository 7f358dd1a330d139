"""fp16's loss scale: a step whose gradient overflows is left out, whoever of several processes sees it."""

import math

import pytest
import torch

from finetune_kernels.primitives.multi_tensor_adamw import MultiTensorAdamW
from finetune_trainer.training.divergence import loss_scale
from finetune_trainer.training.divergence.loss_scale import (
    FIRST_SCALE,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    LossScale,
    clip_scaled,
)


class Run:
    """A few weights, trained towards a target."""

    def __init__(self, *, scaled: bool) -> None:
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        self.optimizer = MultiTensorAdamW([self.weight], torch.optim.AdamW, lr=0.1)
        self.scale = LossScale() if scaled else None

    def step(self, factor: float = 1.0, from_others: float = 0.0) -> None:
        """`from_others`: what other processes add to the gradient."""
        loss = ((self.weight - 2) ** 2).sum()
        loss.register_hook(lambda gradient: gradient * factor)
        (loss if self.scale is None else self.scale.scale(loss)).backward()
        clip_scaled(self.optimizer, 1.0, lambda part: part.add_(from_others), self.scale)
        if self.scale is None:
            self.optimizer.step()
        else:
            self.scale.step(self.optimizer)
            self.scale.update()
        self.weight.grad = None


def test_a_scale_changes_no_update() -> None:
    plain, scaled = Run(scaled=False), Run(scaled=True)
    for run in (plain, scaled):
        for _ in range(3):
            run.step()
    assert torch.equal(plain.weight, scaled.weight), "it is a power of two"


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("own", [True, False], ids=["an own gradient", "another process's gradient"])
def test_a_step_that_overflows_is_left_out(value: float, own: bool) -> None:
    run, never = Run(scaled=True), Run(scaled=True)
    assert run.scale is not None
    run.step()
    before = run.weight.detach().clone()
    run.step(factor=value) if own else run.step(from_others=value)
    assert torch.equal(run.weight, before)
    assert run.scale.value == FIRST_SCALE / 2

    run.step()
    never.step()
    never.step()
    assert torch.equal(run.weight, never.weight), "nothing of it is left in the optimiser"


def test_without_a_scale_the_weights_would_be_lost() -> None:
    run = Run(scaled=False)
    run.step(factor=math.inf)
    assert not run.weight.isfinite().all()


def test_the_scale_grows_after_many_good_steps_and_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GOOD_STEPS", 3)
    scale, good, bad = LossScale(), torch.tensor(1.0), torch.tensor(math.inf)

    def take(*norms: torch.Tensor) -> float:
        for norm in norms:
            scale.take_norm(norm)
            scale.update()
        return scale.value

    assert take(good, good) == FIRST_SCALE
    assert take(bad, good, good) == FIRST_SCALE / 2, "it begins to count anew"
    assert take(good) == FIRST_SCALE
    assert take(*[good] * 60) == LARGEST_SCALE
    assert take(*[bad] * 60) == SMALLEST_SCALE


def test_a_checkpoint_keeps_the_scale() -> None:
    first, second = LossScale(), LossScale()
    first.value, first._good_steps = 512.0, 7
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() == {"scale": 512.0, "good_steps": 7}
    second.load_state_dict(torch.amp.GradScaler("cpu").state_dict())
    assert second.value == FIRST_SCALE
