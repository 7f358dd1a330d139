"""Samples the rows to encode: all rows are checked, but only as many are encoded as a budget of text allows.

Checking runs at a hundred MB/s, encoding at a few. The sample is spread evenly over all rows seen, without knowing
their number beforehand: whenever the kept rows' text exceeds the budget, the share of rows that is taken is halved, and
of the rows kept so far only those of the smaller share remain.

If not all rows are taken, 500 to 1,000 are enough, provided that they have a quarter of the budget: tokenizers take a
second for two million characters. The files' sizes and the first rows tell the share to begin with, so that little is
encoded in vain. Membership follows from the row's number alone (Fibonacci hashing, which hits no period of the data).
Small data are measured completely.
"""

from dataclasses import dataclass

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio
_MASK = (1 << 64) - 1

ENOUGH_ROWS = 1000
FIRST_ROWS = 16
"""Rows whose size tells about how many rows there are."""


@dataclass(frozen=True)
class MeasuredRow:
    """One encoded row."""

    number: int
    characters: int

    length: int
    """Tokens of the whole row."""

    supervised: int
    """Tokens with loss after truncation."""

    unknown: int = 0
    """Tokens of the whole row that stand for what the tokenizer does not know."""


class RowSample:
    """The measured rows, evenly spread."""

    def __init__(self, budget_characters: int, expected_characters: int = 0) -> None:
        """`expected_characters`: about as many are in all rows, at most; 0 if nothing is known."""
        self._budget = budget_characters
        self._halvings = max(0, (expected_characters // budget_characters).bit_length() - 1)
        self._expected = expected_characters
        self._characters = 0
        self.rows: list[MeasuredRow] = []

    def wants(self, number: int) -> bool:
        """True if the row of this number (from 0) belongs to the sample."""
        return (number * _GOLDEN & _MASK) >> (64 - self._halvings) == 0

    def add(self, row: MeasuredRow) -> None:
        """Takes a row that `wants` named."""
        self.rows.append(row)
        self._characters += row.characters

        if len(self.rows) == FIRST_ROWS and self._halvings:
            self._foresee()

        while self._is_full() and len(self.rows) > 1:
            self._halvings += 1
            self._thin_out()

    def _is_full(self) -> bool:
        is_enough = len(self.rows) > ENOUGH_ROWS and self._characters > self._budget // 4
        return self._characters > self._budget or (self._halvings > 0 and is_enough)

    def _foresee(self) -> None:
        """Halves the share as often as the rows to come would make it do anyway."""
        rows = self._expected * len(self.rows) // max(1, self._characters)  # about as many are in all files
        before = self._halvings
        while rows >> self._halvings > ENOUGH_ROWS and self._expected >> self._halvings > self._budget // 4:
            self._halvings += 1
        if self._halvings > before:
            self._thin_out()

    def _thin_out(self) -> None:
        """Drops the kept rows that the smaller share does not have."""
        self.rows = [kept for kept in self.rows if self.wants(kept.number)]
        self._characters = sum(kept.characters for kept in self.rows)

    @property
    def is_complete(self) -> bool:
        """True if every row was to be measured."""
        return self._halvings == 0
