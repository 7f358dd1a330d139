"""Statistics of the rows: token lengths and duplicates. Pure: numbers in, numbers out."""

from array import array
from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np

from finetune_trainer.preflight.report import HistogramBin, TokenStatistics

BINS = 24
MAX_HASHED_ROWS = 20_000_000  # 8 bytes each
COMPARED_ROWS = 1_000_000
"""Rows of one data set that are looked up in another at a time: 20 MB."""


def describe_tokens(lengths: Sequence[int], supervised: Sequence[int], max_length: int) -> TokenStatistics | None:
    """Statistics of rows; None without rows. Percentiles are nearest-rank, so each is a length that occurs.

    `lengths`: tokens of each row before truncation. `supervised`: tokens with loss after truncation to `max_length`.
    """
    if not lengths:
        return None

    ordered = sorted(lengths)
    kept = sum(min(length, max_length) for length in lengths)  # tokens after truncation
    return TokenStatistics(
        rows=len(ordered),
        p50=percentile(ordered, 50),
        p95=percentile(ordered, 95),
        max=ordered[-1],
        truncated_share=sum(length > max_length for length in ordered) / len(ordered),
        supervised_share=sum(supervised) / max(1, kept),
        unsupervised_row_share=sum(count == 0 for count in supervised) / len(ordered),
        histogram=histogram(ordered),
    )


def percentile(ordered: Sequence[int], percent: int) -> int:
    """Nearest-rank percentile of a sorted, non-empty sequence."""
    return ordered[max(0, ceil(len(ordered) * percent / 100) - 1)]


def histogram(ordered: Sequence[int]) -> tuple[HistogramBin, ...]:
    """At most `BINS` bins of equal width over sorted lengths.

    One very long row would leave the others few bins, so the last bin begins at the 99th percentile and takes all that
    is longer.
    """
    low, high = ordered[0], max(ordered[0] + 1, percentile(ordered, 99) + 1)
    edges = sorted({low + round((high - low) * index / BINS) for index in range(BINS + 1)})
    edges[-1] = max(edges[-1], ordered[-1] + 1)

    # Edges between whole numbers, so that no length lies on one.
    counts, _ = np.histogram(np.asarray(ordered), bins=[edge - 0.5 for edge in edges])
    return tuple(
        HistogramBin(first=first, last=last - 1, rows=int(rows))
        for (first, last), rows in zip(pairwise(edges), counts, strict=True)
    )


class DuplicateCounter:
    """Counts rows that occurred before, in 8 bytes a row.

    Keeps 64-bit hashes (Python's own, keyed anew in each process). With ten million different rows two of them share a
    hash with a chance of 3 in a million.
    """

    def __init__(self) -> None:
        self._hashes = array("q")
        self.is_complete = True

    def add(self, fingerprint: int) -> None:
        """Counts a row; rows beyond MAX_HASHED_ROWS are no longer looked at."""
        if len(self._hashes) < MAX_HASHED_ROWS:
            self._hashes.append(fingerprint)
        else:
            self.is_complete = False

    def duplicates(self) -> int:
        """Number of rows that repeat an earlier one. Ends the counting."""
        return int(np.count_nonzero(self._repeats()))

    def with_a_twin(self) -> int:
        """Number of rows that occur more than once, their first occurrence included. Ends the counting."""
        repeats = self._repeats()
        has_twin = np.zeros(len(repeats) + 1, dtype=bool)
        has_twin[1:] |= repeats
        has_twin[:-1] |= repeats
        return int(np.count_nonzero(has_twin))

    def count_in(self, other: "DuplicateCounter") -> int:
        """Number of rows that `other` has counted, too. Ends the counting of both."""
        own, there = self._sorted(), other._sorted()
        if not len(there):
            return 0

        found = 0
        for start in range(0, len(own), COMPARED_ROWS):
            part = own[start : start + COMPARED_ROWS]
            nearest = np.minimum(np.searchsorted(there, part), len(there) - 1)
            found += int(np.count_nonzero(there[nearest] == part))
        return found

    def _repeats(self) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """True for each hash, in order and but for the first, that equals the one before it."""
        hashes = self._sorted()
        return np.equal(hashes[1:], hashes[:-1])

    def _sorted(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The hashes, sorted in place."""
        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        hashes.sort()
        return hashes
