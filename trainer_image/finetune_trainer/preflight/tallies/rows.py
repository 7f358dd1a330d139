"""Counts rows that have something in common, with examples. Pure."""

from dataclasses import dataclass, field

from finetune_trainer.data.report_limits import MAX_EXAMPLE_ROWS


@dataclass
class RowTally:
    """Rows that have something in common."""

    rows: int = 0
    items: int = 0
    """Such things in these rows."""

    examples: list[str] = field(default_factory=list)
    """Locations of the first of these rows."""

    def add(self, location: str, items: int = 1) -> None:
        """Takes a row with so many of these things."""
        self.rows += 1
        self.items += items
        if len(self.examples) < MAX_EXAMPLE_ROWS:
            self.examples.append(location)

    def named(self) -> str:
        """The count and the examples: 7 rows (a.jsonl:1, a.jsonl:2, ...)."""
        more = ", ..." if self.rows > len(self.examples) else ""
        return f"{self.rows} {'row' if self.rows == 1 else 'rows'} ({', '.join(self.examples)}{more})"
