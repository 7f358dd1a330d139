"""Computes a run's optimiser steps and tokens, by the arithmetic of TRL's packing and of transformers' loop. Pure."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from finetune_api.spec.inputs import DatasetSpec
from finetune_api.spec.training import TrainingSpec

PACKING_BATCH = 1000  # rows that TRL packs at a time (datasets' default batch of map)


@dataclass(frozen=True)
class RunLength:
    """The length of a run."""

    steps: int

    rows: int
    """Rows that train."""

    sequences: int
    """Sequences that the rows make, which are one epoch: fewer than rows with packing."""

    epochs: float
    """Passes over the data in all steps."""


@dataclass(frozen=True)
class TrainingSize(RunLength):
    """The amount of training."""

    tokens: int
    """Tokens in all steps, padding left out (there is none)."""

    longest_sequence: int
    """Most tokens that a sequence can have; with packing, rows share one."""


def run_length(rows: int, sequences: int, training: TrainingSpec) -> RunLength:
    """The length of a run whose `rows` make so many sequences."""
    steps, epochs = optimizer_steps(sequences, training), training.epochs or 1.0
    if training.max_steps is not None:
        epochs = steps / steps_per_epoch(sequences, training)
    return RunLength(steps, rows, sequences, epochs)


def training_size(
    lengths: Sequence[int],
    usable_rows: int,
    longest_row: int,
    dataset: DatasetSpec,
    training: TrainingSpec,
    max_length: int,
) -> TrainingSize:
    """The size of a run over `usable_rows`.

    `lengths` (tokens, not empty) are those of an evenly spread sample, whose packing stands for that of all rows. The
    longest row need not be in the sample.
    """
    truncated = [min(length, max_length) for length in lengths]
    sampled = count_packed(truncated, max_length) if dataset.packing else len(truncated)  # sequences of the sample
    per_sequence = sum(truncated) / sampled

    rows = training_rows(usable_rows, dataset)
    sequences = max(1, round(rows * sampled / len(truncated)))
    length = run_length(rows, sequences, training)

    packed = round(sum(truncated) * rows / len(truncated)) if dataset.packing else 0  # if one sequence held all rows
    return TrainingSize(
        **vars(length),
        tokens=round(length.epochs * sequences * per_sequence),
        longest_sequence=min(max_length, max(longest_row, packed)),
    )


def count_packed(lengths: Sequence[int], max_length: int) -> int:
    """Number of sequences of at most `max_length` tokens after best-fit-decreasing packing, in batches as TRL does."""
    total = 0
    for start in range(0, len(lengths), PACKING_BATCH):
        batch = [min(length, max_length) for length in lengths[start : start + PACKING_BATCH]]
        free: list[int] = []  # space left in each open sequence, ascending

        for length in sorted(batch, reverse=True):
            at = bisect_left(free, length)  # the sequence with the least space that is enough
            space = free.pop(at) if at < len(free) else max_length
            total += at == len(free) and space == max_length
            insort(free, space - length)
    return total


def training_rows(rows: int, dataset: DatasetSpec) -> int:
    """Number of rows that train: those that are not held out for evaluation."""
    if dataset.evaluation is None or dataset.evaluation.fraction is None or rows < 2:
        return rows
    return rows - min(rows - 1, max(1, round(rows * dataset.evaluation.fraction)))


def optimizer_steps(sequences: int, training: TrainingSpec) -> int:
    """Optimiser steps over so many sequences on one GPU; the last step of an epoch may be a short one."""
    if training.max_steps is not None:
        return training.max_steps
    return ceil((training.epochs or 1.0) * steps_per_epoch(sequences, training))


def steps_per_epoch(sequences: int, training: TrainingSpec) -> int:
    """Optimiser steps in one pass over so many sequences."""
    return max(1, ceil(sequences / training.sequences_per_step()))
