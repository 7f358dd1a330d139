"""The plan takes the fastest policies that fit, and predicts the peak that was measured."""

from dataclasses import replace

import pytest

from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory, smaller_plan
from finetune_kernels.planning.model_shape import ModelShape
from finetune_kernels.planning.rates import UNLIMITED, Machine

GIB = 2**30
LLAMA_8B = ModelShape(
    layers=32, hidden=4096, heads=32, key_value_heads=8, head_size=128, feed_forward=14336, vocabulary=128256,
    linear_parameters=6_979_321_856, adapter_parameters=41_943_040, quantized=True,
)  # fmt: skip
BASE = int(5.47 * GIB)


@pytest.mark.parametrize(
    ("gib", "mode", "keep_dequantized", "first", "last"),
    [
        (140, MemoryMode.FASTEST, True, ActivationPolicy.SAVE_ALL, ActivationPolicy.SAVE_ALL),
        (24, MemoryMode.FASTEST, False, ActivationPolicy.SAVE_ALL, ActivationPolicy.SAVE_ALL),
        (16, MemoryMode.FASTEST, False, ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.SAVE_ALL),
        (7, MemoryMode.FASTEST, False, ActivationPolicy.OFFLOAD, ActivationPolicy.OFFLOAD),
        (140, MemoryMode.BALANCED, False, ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.RECOMPUTE_MLP),
        (140, MemoryMode.SMALLEST, False, ActivationPolicy.OFFLOAD, ActivationPolicy.OFFLOAD),
    ],
)
def test_the_fastest_plan_that_fits_is_taken(
    gib: int, mode: MemoryMode, keep_dequantized: bool, first: ActivationPolicy, last: ActivationPolicy
) -> None:
    plan = plan_memory(LLAMA_8B, 4096, base_bytes=BASE, total_bytes=gib * GIB, mode=mode)
    assert (plan.keep_dequantized, plan.policies[0], plan.policies[-1]) == (keep_dequantized, first, last)
    assert plan.fits == (gib != 7)


def test_the_predicted_peak_is_what_was_measured() -> None:
    """Measured on one H200, Llama 8B shape, 2 x 2048 tokens: 30.74 GiB with all saved, 6.50 GiB at the smallest."""
    for mode, measured in ((MemoryMode.FASTEST, 30.74), (MemoryMode.SMALLEST, 6.50)):
        plan = plan_memory(LLAMA_8B, 4096, base_bytes=BASE, total_bytes=140 * GIB, mode=mode)
        assert plan.peak_bytes / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("gib", "modes"),
    [
        (140, [MemoryMode.FASTEST, MemoryMode.BALANCED, MemoryMode.SMALLEST]),
        (12, [MemoryMode.FASTEST, MemoryMode.BALANCED, MemoryMode.SMALLEST]),  # where Fastest keeps what Balanced may
        (7, [MemoryMode.SMALLEST]),
    ],
)
def test_after_memory_ran_out_the_next_mode_that_needs_less_is_taken(gib: int, modes: list[MemoryMode]) -> None:
    def plan_for(mode: MemoryMode, most: int = UNLIMITED) -> MemoryPlan:
        return plan_memory(LLAMA_8B, 4096, base_bytes=BASE, total_bytes=min(gib * GIB, most), mode=mode)

    plan: MemoryPlan | None = plan_for(MemoryMode.FASTEST)
    found = []
    while plan is not None:
        found.append(plan)
        plan = smaller_plan(plan, plan_for)
    assert [plan.mode for plan in found] == modes
    peaks = [plan.peak_bytes for plan in found]
    assert peaks == sorted(set(peaks), reverse=True)


def test_what_host_memory_does_not_take_stays_on_the_gpu() -> None:
    """131,072 tokens: 1 GiB of inputs for each of 32 layers, and 1.96 GiB of vocabulary, which take 2 there."""
    shape = replace(LLAMA_8B, movable_bytes=2 * LLAMA_8B.vocabulary * LLAMA_8B.hidden * 2)

    def with_room(room: int) -> MemoryPlan:
        mode = MemoryMode.SMALLEST
        return plan_memory(shape, 131_072, base_bytes=BASE, total_bytes=80 * GIB, mode=mode, machine=Machine(room))

    everything = with_room(UNLIMITED)
    assert everything.pinned_bytes == (32 + 2) * GIB
    assert everything.host_bytes == shape.movable_bytes < 2 * GIB
    plans = [with_room(room * GIB) for room in (-1, 0, 1, 2, 8, 20, 33, 34)]
    assert [plan.policies.count(ActivationPolicy.OFFLOAD) for plan in plans] == [0, 0, 1, 2, 8, 20, 31, 32]
    assert [plan.host_bytes > 0 for plan in plans] == [False] * 6 + [True] * 2
    assert plans[-1] == everything
    for room, plan in zip((0, 0, 1, 2, 8, 20, 33, 34), plans, strict=True):
        assert plan.pinned_bytes <= room * GIB
        assert ("pinned in host memory", f"{plan.pinned_bytes / GIB:.2f} GiB") in plan.rows()

    peaks = [plan.peak_bytes for plan in plans]
    assert peaks == sorted(peaks, reverse=True)

    # A byte that is not pinned is on the GPU instead.
    kept = plans[1]
    assert kept.activation_bytes == 32 * GIB
    assert kept.peak_bytes - everything.peak_bytes > 32 * GIB
