"""How many optimiser steps a run takes: the arithmetic of TRL's packing and of transformers' loop. Pure."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from math import ceil

from finetune_api.spec_inputs import DatasetSpec
from finetune_api.spec_training import TrainingSpec

PACKING_BATCH = 1000  # rows that TRL packs at a time (datasets' default batch of map)


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
