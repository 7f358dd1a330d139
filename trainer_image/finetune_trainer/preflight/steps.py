"""How many optimiser steps and tokens a run takes: the arithmetic of TRL's packing and of transformers' loop. Pure."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from finetune_api.spec.inputs import DatasetSpec
from finetune_api.spec.training import TrainingSpec

PACKING_BATCH = 1000  # rows that TRL packs at a time (datasets' default batch of map)


@dataclass(frozen=True)
class TrainingSize:
    """How much is trained."""

    steps: int
    tokens: int
    """In all steps, padding left out (there is none)."""
    longest_sequence: int
    """Most tokens that a sequence can have; packed rows share one."""


def training_size(
    lengths: Sequence[int],
    usable_rows: int,
    longest_row: int,
    dataset: DatasetSpec,
    training: TrainingSpec,
    max_length: int,
) -> TrainingSize:
    """The size of a run over `usable_rows`, of which `lengths` (in tokens, not empty) are an even sample; its packing
    stands for that of all. The longest row need not be in the sample."""
    cut = [min(length, max_length) for length in lengths]
    sequences = count_packed(cut, max_length) if dataset.packing else len(cut)
    rows = training_rows(usable_rows, dataset)
    of_all = max(1, round(rows * sequences / len(cut)))
    steps = optimizer_steps(of_all, training)
    per_sequence = sum(cut) / sequences
    if training.max_steps is not None:
        tokens = steps * training.sequences_per_step() * per_sequence
    else:
        tokens = (training.epochs or 1.0) * of_all * per_sequence
    together = round(sum(cut) * rows / len(cut)) if dataset.packing else 0
    return TrainingSize(steps, round(tokens), min(max_length, max(longest_row, together)))


def count_packed(lengths: Sequence[int], max_length: int) -> int:
    """Sequences of at most `max_length` tokens after best-fit-decreasing packing, done in batches as TRL does."""
    total = 0
    for start in range(0, len(lengths), PACKING_BATCH):
        free: list[int] = []  # space left in each open sequence, ascending
        for length in sorted(
            (min(length, max_length) for length in lengths[start : start + PACKING_BATCH]), reverse=True
        ):
            at = bisect_left(free, length)
            space = free.pop(at) if at < len(free) else max_length
            total += at == len(free) and space == max_length
            insort(free, space - length)
    return total


def training_rows(rows: int, dataset: DatasetSpec) -> int:
    """Rows that train: those that are not held out for evaluation."""
    if dataset.evaluation is None or dataset.evaluation.fraction is None or rows < 2:
        return rows
    return rows - min(rows - 1, max(1, round(rows * dataset.evaluation.fraction)))


def optimizer_steps(sequences: int, training: TrainingSpec) -> int:
    """Optimiser steps over so many sequences on one GPU; the last step of an epoch may be a short one."""
    if training.max_steps is not None:
        return training.max_steps
    per_epoch = max(1, ceil(sequences / training.sequences_per_step()))
    return ceil((training.epochs or 1.0) * per_epoch)
