"""Lays out the histogram of token lengths: positions and sizes that the page draws. Pure.

report.html.jinja -> Histogram(bars, grid, labels)      all lengths in px of the picture, whose origin is top left
"""

from dataclasses import dataclass
from math import floor, log10

from finetune_trainer.preflight.report import HistogramBin, TokenStatistics

WIDTH, HEIGHT = 760, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 14, 24  # margins around the bars
GRID_LINES = 4  # above the axis
AXIS_LABELS = 6
MIN_BAR_WIDTH, BAR_GAP = 1.0, 2
STEP_DIGITS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Bar:
    """The rows of one bin."""

    entry: HistogramBin
    x: float
    y: float
    width: float
    height: float
    is_truncated: bool
    """Rows of this bin are longer than the limit and are truncated in training."""


@dataclass(frozen=True)
class GridLine:
    """A horizontal line, and the number of rows that it stands for."""

    y: float
    rows: str


@dataclass(frozen=True)
class AxisLabel:
    """A number of tokens below the bars."""

    x: float
    tokens: int


@dataclass(frozen=True)
class Histogram:
    """The whole picture."""

    bars: tuple[Bar, ...]
    grid: tuple[GridLine, ...]
    labels: tuple[AxisLabel, ...]
    width: int = WIDTH
    height: int = HEIGHT
    grid_start: int = LEFT
    grid_end: int = WIDTH - RIGHT


def lay_out_histogram(tokens: TokenStatistics, limit: int) -> Histogram:
    """Bars of rows by tokens; those beyond `limit` tokens are marked."""
    bins = tokens.histogram
    step = _round_step(max(entry.rows for entry in bins) / GRID_LINES)
    bin_width = (WIDTH - LEFT - RIGHT) / len(bins)
    shown = max(1, len(bins) // AXIS_LABELS)  # bins from one label to the next

    return Histogram(
        bars=tuple(_bar(entry, LEFT + i * bin_width, bin_width, step, limit) for i, entry in enumerate(bins)),
        grid=tuple(GridLine(_height_to_y(i / GRID_LINES), _short(step * i)) for i in range(GRID_LINES + 1)),
        labels=tuple(AxisLabel(LEFT + i * bin_width, bins[i].first) for i in range(0, len(bins), shown)),
    )


def _bar(entry: HistogramBin, x: float, bin_width: float, step: int, limit: int) -> Bar:
    share = entry.rows / (step * GRID_LINES)
    return Bar(
        entry=entry,
        x=x + BAR_GAP / 2,
        y=_height_to_y(share),
        width=max(MIN_BAR_WIDTH, bin_width - BAR_GAP),
        height=(HEIGHT - TOP - BOTTOM) * share,
        is_truncated=entry.last > limit,
    )


def _height_to_y(share: float) -> float:
    """The y of a share, 0 to 1, of the height between axis and top line."""
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _round_step(step: float) -> int:
    """The next of 1, 2, 2.5, 5, 10, 20, 25, ... that is whole and at least `step`."""
    power = 10 ** max(0, floor(log10(max(step, 1.0))))
    return next(int(digit * power) for digit in STEP_DIGITS if digit * power >= step and digit * power % 1 == 0)


def _short(count: float) -> str:
    """A number of rows in a few letters, such as 2.5k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
