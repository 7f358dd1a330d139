"""Chooses how many sequences go through the model at once, if the user did not. Pure.

A step of S sequences is S / m passes over m sequences. A pass takes the time of its matrix products, but at least the
time that the CPU needs to launch it, plus what the memory plan for m spends on recomputing and dequantising:

    step(m) = S / m * (max(launches, 1.4 * 4 * parameters * tokens(m) / rate) + extra(m))

Short sequences are gathered until launching no longer dominates, and weights that are not kept dequantised are
dequantised less often, and streamed ones copied less often. A larger m has its price once activations no longer fit.
Times within 1 % are equal, and the largest m of those is taken: fixed costs that are not counted here fall with it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from finetune_api.spec.training import TrainingSpec
from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.memory_plan import MemoryPlan
from finetune_kernels.planning.model_shape import ModelShape

LAUNCH_SECONDS = 4.2e-3
"""CPU time to launch one layer, forward and backward (measured on an H200's host: 135 ms for 32 layers)."""
PASS_OVER_PRODUCTS = 1.4
"""A real pass takes 1.4 times its matrix products (measured on an H200: 241 ms where the formula has 176, for 4,096
tokens at 8B)."""
MAX_TOKENS = 32_768
"""Tokens of a pass with more than one sequence; the GPU is busy long before, and indices into gate and up fit in 32
bits."""
EQUAL = 1.01
"""Ratio of two times that count as equal."""
DEFAULT_SIZE = 2
"""Sequences in a pass that no plan decides."""


@dataclass(frozen=True)
class MicroBatch:
    """Sequences in one pass, and passes per optimiser step."""

    size: int
    accumulation: int

    @property
    def sequences(self) -> int:
        """Sequences per optimiser step."""
        return self.size * self.accumulation


def written_micro_batch(training: TrainingSpec) -> MicroBatch | None:
    """Returns a job's own micro-batch; None if it leaves that open."""
    return MicroBatch(training.batch_size, training.gradient_accumulation) if training.batch_size else None


def default_micro_batch(sequences: int) -> MicroBatch:
    """Splits a step without a plan: two sequences a pass if their number is even, else one."""
    size = DEFAULT_SIZE if sequences % DEFAULT_SIZE == 0 else 1
    return MicroBatch(size, sequences // size)


def choose_micro_batch(
    shape: ModelShape, sequences: int, length: int, mode: MemoryMode, plan_for: Callable[[int], MemoryPlan]
) -> MicroBatch:
    """Splits a step of `sequences`, each at most `length` tokens.

    `plan_for` gives the plan of `mode` for a pass of so many tokens. Mode `Smallest` takes one sequence at a time.
    Where only a smaller plan fits, its speed decides: weights that stream are waited for once a pass.
    """
    if mode is MemoryMode.SMALLEST:
        return MicroBatch(1, sequences)

    plans = {size: plan_for(size * length) for size in _sizes(sequences, length)}
    fitting = {size: plan for size, plan in plans.items() if plan.fits}
    # A plan that fell back to a smaller mode is not what the user asked for.
    wanted = {size: plan for size, plan in fitting.items() if plan.mode is mode} or fitting
    if not wanted:
        return MicroBatch(1, sequences)

    seconds = {
        size: step_seconds(shape, MicroBatch(size, sequences // size), length, plan) for size, plan in wanted.items()
    }
    # The largest of those within 1 % of the fastest.
    limit = EQUAL * min(seconds.values())
    size = max(size for size, needed in seconds.items() if needed <= limit)
    return MicroBatch(size, sequences // size)


def largest_without_recompute(sequences: int, length: int, saves: Callable[[int], bool]) -> MicroBatch:
    """Splits a step into the largest passes whose activations are saved, or by default if none are.

    `saves` says whether a pass of so many tokens saves its activations.
    """
    sizes = [size for size in _sizes(sequences, length) if saves(size * length)]
    return MicroBatch(sizes[-1], sequences // sizes[-1]) if sizes else default_micro_batch(sequences)


def step_seconds(shape: ModelShape, batch: MicroBatch, length: int, plan: MemoryPlan) -> float:
    """Predicted seconds of an optimiser step, by the module's formula."""
    # 4 FLOP a parameter and token, as frozen weights have no gradient: 2 forward, 2 for dx.
    parameters = shape.active_parameters + shape.vocabulary * shape.hidden  # linear layers and head
    products = PASS_OVER_PRODUCTS * 4.0 * parameters * batch.size * length / plan.rates.products
    return batch.accumulation * (max(LAUNCH_SECONDS * shape.layers, products) + plan.extra_milliseconds / 1e3)


def _sizes(sequences: int, length: int) -> list[int]:
    """Divisors of a step that may be a pass, ascending."""
    return [m for m in range(1, sequences + 1) if sequences % m == 0 and (m == 1 or m * length <= MAX_TOKENS)]
