"""Counts what the chat template makes of the reasoning of answers. Pure.

Counted over the rows that are encoded, as the template has to print a row for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune_trainer.chat.sandbox.reasoning import Fate
from finetune_trainer.preflight.tallies.rows import RowTally


@dataclass
class ReasoningTally:
    """Counts over the encoded rows."""

    rows: int = 0
    """Encoded rows, with reasoning or without."""

    answers: int = 0
    """Answers that carry loss and have reasoning."""

    fates: dict[Fate, RowTally] = field(default_factory=lambda: {fate: RowTally() for fate in Fate})

    def add(self, location: str, fates: Sequence[Fate]) -> None:
        """Takes an encoded row with the fates of its answers' reasoning."""
        self.rows += 1
        self.answers += len(fates)
        for fate in set(fates):
            self.fates[fate].add(location, fates.count(fate))
