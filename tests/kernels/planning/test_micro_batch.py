"""The split of a step where the user left it to us, on the sizes of real models and GPUs."""

from collections.abc import Callable

import pytest

from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory
from finetune_kernels.planning.micro_batch import (
    MAX_TOKENS,
    MicroBatch,
    choose_micro_batch,
    default_micro_batch,
    largest_without_recompute,
    step_seconds,
)
from finetune_kernels.planning.model_shape import ModelShape

GIB = 2**30
LLAMA_8B = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, 6_979_321_856, 41_943_040, quantized=True)
LLAMA_1B = ModelShape(16, 2048, 32, 8, 64, 8192, 128256, 973_078_528, 11_272_192, quantized=True)
BASE = {LLAMA_8B: 6 * GIB, LLAMA_1B: int(1.2 * GIB)}


def planner(shape: ModelShape, gib: float, mode: MemoryMode = MemoryMode.FASTEST) -> Callable[[int], MemoryPlan]:
    return lambda tokens: plan_memory(shape, tokens, base_bytes=BASE[shape], total_bytes=int(gib * GIB), mode=mode)


def choose(
    shape: ModelShape, gib: float, length: int = 2048, sequences: int = 8, mode: MemoryMode = MemoryMode.FASTEST
) -> MicroBatch:
    batch = choose_micro_batch(shape, sequences, length, mode, planner(shape, gib, mode))
    assert batch.sequences == sequences
    return batch


def test_with_room_for_everything_the_largest_is_taken() -> None:
    batch = choose(LLAMA_8B, 139)
    assert batch == MicroBatch(8, 1)
    plan = planner(LLAMA_8B, 139)(batch.size * 2048)
    assert set(plan.policies) == {ActivationPolicy.SAVE_ALL}
    assert plan.keep_dequantized


def test_what_does_not_fit_is_not_bought_with_recomputation() -> None:
    sizes = [choose(LLAMA_8B, gib).size for gib in (12, 24, 40, 60, 80, 139)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    plan = planner(LLAMA_8B, 40)(choose(LLAMA_8B, 40).size * 2048)
    assert plan.fits
    assert plan.mode is MemoryMode.FASTEST


@pytest.mark.parametrize("gib", [16, 24, 40, 48, 80, 139])
@pytest.mark.parametrize("length", [256, 2048, 8192])
def test_no_other_split_that_fits_is_faster_by_more_than_a_hundredth(gib: float, length: int) -> None:
    plan_for = planner(LLAMA_8B, gib)

    def seconds(size: int) -> float:
        return step_seconds(LLAMA_8B, MicroBatch(size, 8 // size), length, plan_for(size * length))

    chosen = choose(LLAMA_8B, gib, length).size
    others = [m for m in (1, 2, 4, 8) if plan_for(m * length).mode is MemoryMode.FASTEST and m * length <= MAX_TOKENS]
    assert chosen in others
    assert all(seconds(chosen) <= 1.01 * seconds(size) for size in others)


def test_short_sequences_are_gathered_until_launching_no_longer_counts() -> None:
    """One sequence of 256 tokens keeps an H200 busy for a tenth of the time that its launches take."""
    one = step_seconds(LLAMA_8B, MicroBatch(1, 8), 256, planner(LLAMA_8B, 139)(256))
    eight = step_seconds(LLAMA_8B, MicroBatch(8, 1), 256, planner(LLAMA_8B, 139)(2048))
    assert one > 4 * eight
    assert choose(LLAMA_8B, 139, length=256).size == 8


def test_a_pass_stays_within_its_bound() -> None:
    assert choose(LLAMA_1B, 139, sequences=64) == MicroBatch(16, 4)
    assert choose(LLAMA_1B, 139, length=2 * MAX_TOKENS).size == 1


def test_smallest_takes_one_at_a_time() -> None:
    assert choose(LLAMA_1B, 139, mode=MemoryMode.SMALLEST) == MicroBatch(1, 8)


def test_where_nothing_fits_one_is_taken() -> None:
    assert choose(LLAMA_8B, 6.5) == MicroBatch(1, 8)


@pytest.mark.parametrize(("sequences", "split"), [(8, (2, 4)), (1, (1, 1)), (7, (1, 7))])
def test_without_a_plan_two_sequences_go_together(sequences: int, split: tuple[int, int]) -> None:
    assert default_micro_batch(sequences) == MicroBatch(*split)


def test_the_largest_that_keeps_its_activations() -> None:
    assert largest_without_recompute(12, 100, lambda tokens: tokens <= 400) == MicroBatch(4, 3)
    assert largest_without_recompute(12, 100, lambda tokens: False) == MicroBatch(2, 6)
