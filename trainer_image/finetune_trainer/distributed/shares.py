"""Shares of a step: a step of S sequences is the same S rows for any number of processes, so the curve is, too.

Of each step's rows, process r of N takes every N-th, from the r-th on. A last step with fewer rows is dealt out in the
same way; a process that would go empty takes FILLER, a row without supervised tokens. So every process makes the same
number of steps and meets the others in each.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

from finetune_kernels.planning.micro_batch import MicroBatch

FILLER = -1
"""Index that stands for a row from which nothing is learned."""


def split_batch(batch: MicroBatch, processes: int) -> MicroBatch:
    """Returns one process's part of a step: the same sequences in all, in passes at most as large.

    Raises ValueError if the step cannot be divided: a job's spec with such values is refused.
    """
    if batch.sequences % processes:
        raise ValueError(f"a step of {batch.sequences} sequences cannot be divided among {processes} processes")

    sequences = batch.sequences // processes
    size = max(size for size in range(1, min(batch.size, sequences) + 1) if sequences % size == 0)
    return MicroBatch(size, sequences // size)


def share_of(rows: Iterable[int], step: int, rank: int, processes: int) -> Iterator[int]:
    """Yields the rows of `rank` out of an epoch's `rows`, for steps of `step` rows."""
    rest = iter(rows)
    while taken := list(islice(rest, step)):
        yield from taken[rank::processes] or [FILLER]


def share_length(rows: int, step: int, rank: int, processes: int) -> int:
    """Returns the number of rows that `share_of` yields."""
    whole, last = divmod(rows, step)
    return whole * (step // processes) + (max(1, len(range(rank, last, processes))) if last else 0)


def evaluation_share(rows: int, rank: int, processes: int) -> Iterator[int]:
    """Yields the rows of `rank` out of `rows` to evaluate on: as many on every rank, with FILLER for a missing one."""
    for first in range(0, rows, processes):
        yield first + rank if first + rank < rows else FILLER
