"""Orders rows by chance, but with rows of like length beside each other, so that padded batches need little padding.

Chance decides which rows share a block of many steps; only within a block rows are sorted. transformers' sampler does
the same, but its order cannot be repeated by a run that resumes, nor be known by preflight, which has no PyTorch.
"""

from collections.abc import Sequence

import numpy as np

BLOCK_STEPS = 50
"""Optimiser steps whose rows are sorted together, as in transformers."""


def group_by_length(lengths: Sequence[int], sequences: int, seed: int) -> list[int]:
    """Returns the rows' numbers in the order of one epoch of at least one row, `sequences` a step; the longest
    row comes first.

    Where memory does not suffice, it is thus the first step that fails.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    size = sequences * max(1, min(BLOCK_STEPS, len(lengths) // (4 * sequences)))
    measured = np.asarray(lengths)

    blocks = [order[start : start + size] for start in range(0, len(order), size)]
    grouped = np.concatenate([block[np.argsort(-measured[block], kind="stable")] for block in blocks])
    longest = int(np.argmax(measured[grouped]))
    grouped[[0, longest]] = grouped[[longest, 0]]
    return [int(number) for number in grouped]


def padding_share(lengths: Sequence[int], size: int) -> float:
    """Share of padding in batches of `size` rows that follow each other, each padded to its longest."""
    computed = sum(max(batch) * len(batch) for batch in _batches(lengths, size))
    return 1 - sum(lengths) / computed if computed else 0.0


def _batches(lengths: Sequence[int], size: int) -> list[Sequence[int]]:
    return [lengths[start : start + size] for start in range(0, len(lengths), size)]
