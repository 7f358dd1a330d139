"""Tables that fit a terminal of any width: the least important columns go first, and a note names them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

GAP = 2
"""Cells between two columns."""
LEAST = 8
"""Cells that a name keeps at least."""
Cell = Text | ProgressBar


@dataclass(frozen=True)
class Fitted:
    """A table that fits, and the titles of the columns that are not in it."""

    table: Table
    hidden: tuple[str, ...]

    @property
    def note(self) -> str:
        """The hidden columns in words; empty if there are none."""
        return f"not shown at this width: {', '.join(self.hidden)}" if self.hidden else ""


def fit_table(
    titles: Sequence[str], rows: Sequence[Sequence[Cell]], width: int, drop: Sequence[str], squeeze: Mapping[str, int]
) -> Fitted:
    """Return the rows as kubectl draws them, in at most `width` cells if that is possible.

    `squeeze`: cells to which a column may be cut before another one goes. `drop`: titles of columns that then go, the
    least important first; the rest is cut further.
    """
    widths = [max([cell_len(title), *(_width(row[place]) for row in rows)]) for place, title in enumerate(titles)]
    shown = list(range(len(titles)))
    hidden: list[str] = []

    empty = [title for title in drop if not any(_width(row[titles.index(title)]) for row in rows)]
    for title in empty:
        if _total(widths, shown) > width:
            shown.remove(titles.index(title))

    _cut(widths, shown, width, {titles.index(title): least for title, least in squeeze.items()})
    for title in (each for each in drop if each not in empty):
        if _total(widths, shown) > width:
            shown.remove(titles.index(title))
            hidden.append(title.lower())
    _cut(widths, shown, width, {titles.index(title): LEAST for title in squeeze})

    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold", expand=False)
    for place in shown:
        table.add_column(titles[place], no_wrap=True, overflow="ellipsis", width=widths[place])
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    return Fitted(table, tuple(hidden))


def _cut(widths: list[int], shown: Sequence[int], width: int, least: Mapping[int, int]) -> None:
    """Take what is too much from the columns in order, down to the least of each."""
    for place, fewest in least.items():
        excess = _total(widths, shown) - width
        if excess > 0 and place in shown:
            widths[place] = max(min(fewest, widths[place]), widths[place] - excess)


def _width(cell: Cell) -> int:
    return cell.cell_len if isinstance(cell, Text) else cell.width or 0


def _total(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[place] + GAP for place in shown) - GAP
