"""How many sequences go through the model at once, where the user left it to us. Pure.

A step of S sequences is S / m passes over m. A pass takes what its products take, at least what its launches take on
the CPU, and what the memory plan for m recomputes or decodes again:

    step(m) = S / m * (max(launches, 1.4 * 4 * parameters * tokens(m) / rate) + extra(m))

So short sequences are gathered until launching no longer is what counts, and weights that do not stay decoded are
decoded less often; activations that no longer fit speak against a larger m. Times within 1 % are equal, and the
largest of those is taken: the fixed costs that are not counted tile_ctx fall with it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.memory_plan import GEMM_RATE, MemoryPlan, ModelShape

LAUNCH_SECONDS = 4.2e-3
"""The CPU's time to launch one layer, forward and backward (measured on an H200's host: 135 ms for 32 layers)."""
BUSY = 1.4
"""Time of a pass over that of its products (measured: 241 ms where the formula has 176 for 4,096 tokens at 8B)."""
MAX_TOKENS = 32_768
"""Of a pass with more than one sequence; the GPU is busy long before, and indices into gate and up stay in 32 bits."""
EQUAL = 1.01
USUAL = 2
"""Sequences in a pass where nothing is planned."""


@dataclass(frozen=True)
class MicroBatch:
    """Sequences in one pass, and passes per optimiser step."""

    size: int
    accumulation: int

    @property
    def sequences(self) -> int:
        """Sequences per optimiser step."""
        return self.size * self.accumulation


def default_micro_batch(sequences: int) -> MicroBatch:
    """What is taken without a plan: two sequences where their number is even."""
    size = USUAL if sequences % USUAL == 0 else 1
    return MicroBatch(size, sequences // size)


def choose_micro_batch(
    shape: ModelShape, sequences: int, length: int, mode: MemoryMode, plan_for: Callable[[int], MemoryPlan]
) -> MicroBatch:
    """Split a step of `sequences`, each at most `length` tokens. `plan_for` gives the plan of `mode` for a pass of so
    many tokens. `Smallest` takes one sequence at a time, as does a device that nothing else fits."""
    if mode is MemoryMode.SMALLEST:
        return MicroBatch(1, sequences)
    seconds = {}
    for size in _sizes(sequences, length):
        plan = plan_for(size * length)
        if plan.fits and plan.mode is mode:
            seconds[size] = step_seconds(shape, MicroBatch(size, sequences // size), length, plan)
    if not seconds:
        return MicroBatch(1, sequences)
    limit = EQUAL * min(seconds.values())
    size = max(size for size, needed in seconds.items() if needed <= limit)
    return MicroBatch(size, sequences // size)


def largest_without_recompute(sequences: int, length: int, keeps: Callable[[int], bool]) -> MicroBatch:
    """Split a step where a plan only says whether a pass of so many tokens keeps its activations; the usual split
    where none does."""
    kept = [size for size in _sizes(sequences, length) if keeps(size * length)]
    return MicroBatch(kept[-1], sequences // kept[-1]) if kept else default_micro_batch(sequences)


def step_seconds(shape: ModelShape, batch: MicroBatch, length: int, plan: MemoryPlan) -> float:
    """Predicted time of an optimiser step; see the module's formula."""
    parameters = shape.linear_parameters + shape.vocabulary * shape.hidden
    products = BUSY * 4.0 * parameters * batch.size * length / GEMM_RATE
    return batch.accumulation * (max(LAUNCH_SECONDS * shape.layers, products) + plan.extra_milliseconds / 1e3)


def _sizes(sequences: int, length: int) -> list[int]:
    """Divisors of a step that may be a pass, ascending."""
    return [m for m in range(1, sequences + 1) if sequences % m == 0 and (m == 1 or m * length <= MAX_TOKENS)]
