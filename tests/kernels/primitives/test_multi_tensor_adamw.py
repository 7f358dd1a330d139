"""The optimiser over one vector, against the ordinary one over the tensors one by one."""

import copy
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

from finetune_kernels.primitives.master_weights import master_weight, split_off_master
from finetune_kernels.primitives.multi_tensor_adamw import MultiTensorAdamW

SHAPES = [(16, 512), (512, 16), (9, 1000), (1001, 7)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
Parameters = list[torch.nn.Parameter]


def flat_adamw(parameters: Any, **options: Any) -> MultiTensorAdamW:
    return MultiTensorAdamW(parameters, AdamW8bit, **OPTIONS | options)


def make(dtype: torch.dtype = torch.float32) -> tuple[Parameters, Parameters]:
    generator = torch.Generator().manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    return ours, copy.deepcopy(ours)


def fill(step: int, *sides: Parameters, gradients: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for several in zip(*sides, strict=True):
        gradient = torch.randn(several[0].shape, generator=generator).to(gradients)
        for parameter in several:
            parameter.grad = gradient.to(parameter.dtype).clone()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [AdamW8bit, PagedAdamW8bit, torch.optim.AdamW])
def test_updates_are_the_inner_optimisers_own_on_values_in_fp32(dtype: torch.dtype, inner: Any) -> None:
    ours, theirs = make(dtype)
    for parameter in theirs:
        parameter.data = parameter.data.float()
    flat, plain = MultiTensorAdamW(ours, inner, **OPTIONS), inner(theirs, **OPTIONS)
    start = [parameter.detach().clone() for parameter in ours]

    for step in range(5):
        fill(step, ours, theirs, gradients=dtype)
        flat.step()
        plain.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        assert torch.equal(master_weight(mine), other)
        assert torch.equal(mine, other.to(dtype))
        assert not torch.equal(mine, before)


def test_updates_that_bfloat16_would_lose_add_up() -> None:
    ours, rounded = make(torch.bfloat16)
    options = {"lr": 1e-5, "weight_decay": 0.0}
    flat, plain = flat_adamw(ours, **options), AdamW8bit(rounded, **OPTIONS | options)
    start = [parameter.detach().clone() for parameter in ours]

    for _ in range(300):
        fill(0, ours, rounded)
        flat.step()
        plain.step()

    # 300 steps of 1e-5 in one direction; half of the last bit of a value around 1 is 2e-3 to 4e-3.
    for before, mine in zip(start, ours, strict=True):
        moved = (master_weight(mine) - before.float()).abs()
        assert moved.mean() == pytest.approx(3e-3, rel=0.05), "8 bits make the moments 2 % off"
    lost = torch.cat([(one == other).flatten() for one, other in zip(start, rounded, strict=True)]).float().mean()
    assert lost > 0.9, "the control: without master weights nearly nothing moves"


def test_starts_from_master_weights() -> None:
    ours, exact = make()
    for parameter in ours:
        split_off_master(parameter, torch.bfloat16)
    flat_adamw(ours)
    for mine, other in zip(ours, exact, strict=True):
        assert mine.dtype is torch.bfloat16
        assert torch.equal(master_weight(mine), other)
        assert not torch.equal(mine.float(), other)


def test_the_learning_rate_of_a_schedule_is_used() -> None:
    ours, theirs = make()
    flat = flat_adamw(ours)
    torch.optim.lr_scheduler.LambdaLR(flat, lambda step: 0.0)
    fill(0, ours)
    flat.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("largest", [1.0, 1e6])
def test_clips_as_torch_does(largest: float) -> None:
    ours, theirs = make()
    flat, plain = flat_adamw(ours), AdamW8bit(theirs, **OPTIONS)
    for step in range(3):
        fill(step, ours, theirs)
        norm = flat.clip_gradients(largest)
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, largest).item(), rel=1e-6)
        flat.step()
        plain.step()
    for mine, other in zip(ours, theirs, strict=True):
        # A gradient that is off by one bit may fall into the next of 256 steps of the 8-bit state.
        assert (mine - other).abs().max() < 0.02 * OPTIONS["lr"] * 3


def test_a_parameter_without_gradient_counts_as_zero() -> None:
    ours, theirs = make()
    flat, plain = flat_adamw(ours), AdamW8bit(theirs, **OPTIONS)
    fill(0, ours, theirs)
    flat.step()
    plain.step()
    fill(1, ours, theirs)
    ours[1].grad, theirs[1].grad = None, torch.zeros_like(theirs[1])
    flat.step()
    plain.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_goes_on_from_its_state() -> None:
    ours, theirs = make()
    flat = flat_adamw(ours)
    fill(0, ours)
    flat.step()
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            other.copy_(mine)

    again, forgetful = flat_adamw(theirs, lr=5.0), flat_adamw(copy.deepcopy(ours))
    again.load_state_dict(copy.deepcopy(flat.state_dict()))
    others = list(forgetful.param_groups[0]["params"])
    fill(1, ours, theirs, others)

    for optimizer in (flat, again, forgetful):
        optimizer.step()
    for mine, other, different in zip(ours, theirs, others, strict=True):
        assert torch.equal(mine, other)
        assert not torch.equal(mine, different)


def test_refuses_the_state_of_other_parameters() -> None:
    flat = flat_adamw(make()[0])
    extra = torch.nn.Parameter(torch.zeros(4096))
    other = flat_adamw([{"params": make()[1]}, {"params": [extra]}])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        flat.load_state_dict(other.state_dict())


def test_says_when_a_parameter_was_moved() -> None:
    ours, _ = make()
    flat = flat_adamw(ours)
    ours[2].data = ours[2].data.clone()
    fill(0, ours)
    with pytest.raises(RuntimeError, match="moved"):
        flat.step()


def test_takes_parameters_of_several_types() -> None:
    ours, theirs = (first + second for first, second in zip(make(), make(torch.bfloat16), strict=True))
    for parameter in theirs:
        parameter.data = parameter.data.float()
    flat, plain = flat_adamw(ours), AdamW8bit(theirs, **OPTIONS)
    fill(0, ours, theirs, gradients=torch.bfloat16)
    flat.step()
    plain.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(master_weight(mine), other)
