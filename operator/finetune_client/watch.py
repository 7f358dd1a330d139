"""`finetune watch`: bars and curves of many jobs on a terminal, plain lines elsewhere."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_api.base import Json
from finetune_api.vocabulary import Stage
from finetune_client.connection import Cluster
from finetune_client.errors import ClientError, Exit
from finetune_client.rows import ENDED, ON_GPU, Row, sorted_rows
from finetune_client.terminal.fitted import Cell, fit_table
from finetune_client.terminal.screen import print_line
from finetune_client.terminal.sparkline import draw_sparkline

_TITLES = ("JOB", "PHASE", "DONE", "", "STEP", "LOSS", "CURVE", "LEFT")
_DROPPED = ("STEP", "LEFT", "CURVE", "LOSS")
_SQUEEZED = {"JOB": 20, "DONE": 12}
_SIZES = ((110, 20, 24), (0, 12, 14))
"""Cells of a terminal at least, and those of a bar and of a curve in it."""

_STAGES = frozenset(stage.value for stage in Stage)

MAX_POINTS = 10_000
"""Losses of one job that are kept for its curve."""


class Board:
    """The jobs as they were last seen, and each one's losses since the watch began: a cluster keeps only the newest."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.trouble = ""
        """Why the jobs could not be read the last time; empty if they could."""
        self._losses: dict[str, list[float]] = defaultdict(list)

    def update(self, jobs: list[Json]) -> list[Row]:
        """Take in the jobs; returns the rows in which something changed."""
        before = {row.uid: _shown(row) for row in self.rows}
        self.rows, self.trouble = sorted_rows(jobs), ""
        for row in self.rows:
            points = self._losses[row.uid]
            if row.loss is not None and (not points or points[-1] != row.loss) and len(points) < MAX_POINTS:
                points.append(row.loss)
        return [row for row in self.rows if before.get(row.uid) != _shown(row)]

    def draw(self, width: int, height: int, *, everywhere: bool) -> RenderableType:
        """Draw the jobs; those that hold a GPU come first, and what does not fit is counted."""
        rows = sorted(self.rows, key=lambda row: (row.phase not in ON_GPU, row.phase in ENDED))
        shown = rows[: max(1, height - 5)]
        bar, curve = next((each for least, *each in _SIZES if width >= least), _SIZES[-1][1:])
        cells = [self._cells(row, bar, curve, everywhere=everywhere) for row in shown]
        fitted = fit_table(_TITLES, cells, width, _DROPPED, _SQUEEZED)

        held = sum(row.gpus for row in rows if row.phase in ON_GPU)
        hidden = f", {len(rows) - len(shown)} more not shown" if len(shown) < len(rows) else ""
        jobs = f"{len(rows)} job{'s' * (len(rows) != 1)} hold{'s' * (len(rows) == 1)}"
        last = self.trouble or f"{jobs} {held} GPU{'s' * (held != 1)}{hidden}; Ctrl-C ends the watch, not the jobs"
        whole = Table.grid()
        whole.add_row(fitted.table)
        for line in filter(None, (last, fitted.note)):
            whole.add_row(Text(line, style="red" if line == self.trouble else "dim"))
        return whole

    def _cells(self, row: Row, bar: int, curve: int, *, everywhere: bool) -> list[Cell]:
        name = f"{row.namespace}/{row.name}" if everywhere else row.name
        return [
            Text(name),
            Text(row.phase or "-", style=row.style),
            _bar_or_reason(row, bar),
            Text(f"{row.percent:>3} %"),
            Text(row.steps_text),
            Text(row.loss_text),
            Text(draw_sparkline(self._losses[row.uid], curve), style="cyan"),
            Text(row.eta),
        ]


def _bar_or_reason(row: Row, width: int) -> Cell:
    """A bar for a job that gets on, and for any other why it does not."""
    if row.reason in ("", row.phase) or (row.phase in ON_GPU and row.reason in _STAGES):
        return ProgressBar(total=100, completed=row.percent, width=width)
    return Text(row.reason, style="red" if row.phase == "Failed" else "yellow" if row.phase in ON_GPU else "dim")


def watch_jobs(
    cluster: Cluster, out: Console, names: Sequence[str], *, everywhere: bool = False, interval: float = 2
) -> Exit:
    """Watch jobs: the named ones until all have ended, or all there are until Ctrl-C."""
    read = _reader(cluster, names, everywhere=everywhere)
    board = Board()
    board.update(first := read())
    if not out.is_terminal:
        _print_changes(out, sorted_rows(first), everywhere=everywhere)
        while not (names and _all_ended(board)):
            time.sleep(interval)
            _print_changes(out, _look(board, read, out), everywhere=everywhere)
        return _result(board)

    with Live(board.draw(out.width, out.height, everywhere=everywhere), console=out, auto_refresh=False) as live:
        while not (names and _all_ended(board)):
            time.sleep(interval)
            _look(board, read, None)
            live.update(board.draw(out.width, out.height, everywhere=everywhere), refresh=True)
    return _result(board)


def _reader(cluster: Cluster, names: Sequence[str], *, everywhere: bool) -> Callable[[], list[Json]]:
    if names:
        return lambda: [cluster.get_job(name) for name in names]
    return lambda: cluster.list_jobs(None if everywhere else cluster.namespace)


def _look(board: Board, read: Callable[[], list[Json]], out: Console | None) -> list[Row]:
    """Read the jobs again; a cluster that is away for a while is said and tried again."""
    try:
        return board.update(read())
    except ClientError as error:
        if error.code is not Exit.NO_CLUSTER:
            raise
        if out is not None and board.trouble != error.message:
            print_line(out, error.message)
        board.trouble = error.message
        return []


def _shown(row: Row) -> tuple[object, ...]:
    return row.phase, row.reason, row.percent, row.step, row.loss


def _print_changes(out: Console, rows: Sequence[Row], *, everywhere: bool) -> None:
    for row in rows:
        name = f"{row.namespace}/{row.name}" if everywhere else row.name
        parts = [row.phase or "-", "" if row.reason == row.phase else row.reason, f"{row.percent} %"]
        parts += [f"step {row.steps_text}" if row.steps_text else "", f"loss {row.loss_text}" if row.loss_text else ""]
        parts += [f"{row.eta} left" if row.eta else "", row.message if row.phase == "Failed" else ""]
        print_line(out, f"{name}: {', '.join(filter(None, parts))}")


def _all_ended(board: Board) -> bool:
    return all(row.phase in ENDED for row in board.rows)


def _result(board: Board) -> Exit:
    return Exit.JOB_FAILED if any(row.phase == "Failed" for row in board.rows) else Exit.OK
