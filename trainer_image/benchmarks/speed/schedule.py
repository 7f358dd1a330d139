"""Order of the measurements, and the time that each takes. Pure.

Systems take turns (A B C A B C), so that a GPU that warms up or slows down does so for all of them. The time is
predicted from the newest speed of the same row and system, so that no measurement starts that would end too late.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from speed.results import Result
from speed.rows import ROWS, WARM_UP

SEARCH_SECONDS = 190.0
"""Time of the search for the longest sequence: two short attempts and two or three long ones."""
UNKNOWN_RATE = 8_000.0
"""Assumed tokens per second of a system that was never measured, at 8B."""


@dataclass(frozen=True)
class Entry:
    """One measurement to make."""

    row: str
    system: str

    def __str__(self) -> str:
        return f"{self.row} {self.system}"


def order(rows: Iterable[str], systems: Sequence[str], repeats: int, again: Sequence[str]) -> list[Entry]:
    """Returns the measurements: row by row, `systems` in turn, `repeats` times.

    A single round ends with the systems in `again`: they are then measured at both ends of the round, and with warm
    caches.
    """
    found = []
    for row in rows:
        able = [system for system in systems if system in ROWS[row].systems]
        found += [Entry(row, system) for _ in range(repeats) for system in able]
        if repeats == 1 and len(able) > 1:
            found += [Entry(row, system) for system in again if system in able]
    return found


def expected_seconds(entry: Entry, known: Sequence[Result], steps: int, *, imported: bool) -> float:
    """Returns the predicted time of a measurement; `imported` if its process has already imported its libraries."""
    row = ROWS[entry.row]
    unsloth = entry.system.startswith("unsloth")
    importing = 0.0 if imported else 25.0 if unsloth else 15.0
    if row.card_gib is not None:
        return importing + SEARCH_SECONDS

    rates = [one.tokens_per_second for one in known if (one.row, one.system) == (entry.row, entry.system)]
    rate = rates[-1] if rates else UNKNOWN_RATE * row.gpus * (4 if row.model == "llama-1b" else 1)

    compiling = 8.0 if unsloth else 5.0
    return importing + 12.0 + compiling + (WARM_UP + steps) * row.tokens / rate
