"""Plans leave nothing unused: cards of 6 to 80 GiB in steps of 2, at 512, 2,048 and 8,192 tokens, for the shapes of
Llama 8B and 1B."""

from functools import cache, partial
from itertools import pairwise

import pytest

from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning import memory_plan
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.memory_plan import STEP_DOWN, MemoryPlan, plan_memory, smaller_plan
from finetune_kernels.planning.model_shape import ModelShape
from finetune_kernels.planning.rates import UNLIMITED, Machine

GIB = 2**30
CARDS = range(6, 81, 2)
TOKENS = (512, 2048, 8192)
MODELS = {
    "8B": (
        ModelShape(
            32, 4096, 32, 8, 128, 14336, 128256, 6_979_321_856, 41_943_040, quantized=True,
            movable_bytes=2 * 128256 * 4096 * 2,
        ),
        int(5.47 * GIB),
    ),
    "1B": (
        ModelShape(
            16, 2048, 32, 8, 64, 8192, 128256, 973_078_528, 11_272_192, quantized=True, movable_bytes=128256 * 2048 * 2
        ),
        int(1.03 * GIB),
    ),
}  # fmt: skip
Plans = dict[int, MemoryPlan]


def plan_of(
    model: str, tokens: int, most: int, mode: MemoryMode = MemoryMode.FASTEST, room: int = UNLIMITED
) -> MemoryPlan:
    shape, base = MODELS[model]
    return plan_memory(shape, tokens, base_bytes=base, total_bytes=most, mode=mode, machine=Machine(room))


@cache
def plans_of(model: str, tokens: int, mode: MemoryMode = MemoryMode.FASTEST, room: int = UNLIMITED) -> Plans:
    return {gib: plan_of(model, tokens, gib * GIB, mode, room) for gib in CARDS}


def unused(plans: Plans) -> list[int]:
    """Cards of which a fifth is unused though there is more to keep."""
    return [gib for gib, plan in plans.items() if plan.extra_milliseconds > 0 and plan.peak_bytes < 0.8 * gib * GIB]


def slower_than_on_a_smaller_card(plans: Plans) -> list[int]:
    return [
        larger for smaller, larger in pairwise(plans)
        if plans[larger].extra_milliseconds > plans[smaller].extra_milliseconds + 1e-9
        or (plans[smaller].fits and not plans[larger].fits)
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("model", MODELS)
def test_a_card_is_used_and_a_larger_one_is_no_slower(model: str, tokens: int) -> None:
    plans = plans_of(model, tokens)
    assert all(plan.fits and plan.mode is MemoryMode.FASTEST for plan in plans.values()), "none falls back"
    assert unused(plans) == []
    assert slower_than_on_a_smaller_card(plans) == []
    assert plans[80].extra_milliseconds == 0, "everything is kept"


@pytest.mark.parametrize("mode", [MemoryMode.BALANCED, MemoryMode.SMALLEST])
def test_the_other_modes_are_no_slower_on_a_larger_card_either(mode: MemoryMode) -> None:
    for tokens in TOKENS:
        assert slower_than_on_a_smaller_card(plans_of("8B", tokens, mode)) == []
        assert all(plan.kept_layers == 0 for plan in plans_of("8B", tokens, mode).values())


def test_without_host_memory_a_card_is_used_as_far_as_a_plan_fits() -> None:
    for tokens in TOKENS:
        fitting = {gib: plan for gib, plan in plans_of("8B", tokens, room=0).items() if plan.fits}
        assert min(fitting) <= 10
        assert {plan.pinned_bytes for plan in fitting.values()} == {0}
        assert unused(fitting) == slower_than_on_a_smaller_card(fitting) == []


def test_all_or_nothing_would_leave_memory_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: weights of all layers or of none, and host memory for everything or for nothing, as it was."""

    def all_or_none(work: memory_plan._Workload, plan: MemoryPlan) -> MemoryPlan:
        kept = partial(memory_plan._predict, work, plan.mode, plan.policies)(kept_layers=work.shape.layers)
        return kept if kept.fits else plan

    monkeypatch.setattr(memory_plan, "_keep_weights", all_or_none)
    plans = {gib: plan_of("8B", 2048, gib * GIB) for gib in CARDS}
    assert unused(plans) == [16, 18, 20, 22, 24]


def test_what_is_pinned_is_worth_its_copies() -> None:
    """Host memory is used where nothing else fits; at 10 GiB and 8,192 tokens recomputing everything is the cheaper
    choice by 10 ms, and the vocabulary stays."""
    assert plans_of("8B", 8192)[8].host_bytes > 0
    assert ActivationPolicy.OFFLOAD in plans_of("8B", 8192)[6].policies
    assert ActivationPolicy.OFFLOAD not in plans_of("8B", 2048)[6].policies
    assert all(plan.pinned_bytes == 0 for tokens in TOKENS for gib, plan in plans_of("8B", tokens).items() if gib >= 10)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("gib", [6, 8, 12, 16, 24, 48, 80])
def test_after_memory_ran_out_the_next_plan_needs_noticeably_less(gib: int, tokens: int) -> None:
    def plan_for(mode: MemoryMode, most: int) -> MemoryPlan:
        return plan_of("8B", tokens, min(gib * GIB, most), mode)

    first = plans_of("8B", tokens)[gib]
    second = smaller_plan(first, plan_for)
    assert second is not None
    least = plan_of("8B", tokens, gib * GIB, MemoryMode.SMALLEST)
    most = first.base_bytes + STEP_DOWN * (first.peak_bytes - first.base_bytes)
    assert second.peak_bytes <= max(most, least.peak_bytes)
    if gib == 12:  # before, all went to the host at once here: 4.6 of 12 GiB
        assert second.mode is MemoryMode.BALANCED
        keeps_all = set(second.policies) == {ActivationPolicy.RECOMPUTE_MLP}
        assert keeps_all or second.peak_bytes > 0.8 * most
        assert second.pinned_bytes == 0
