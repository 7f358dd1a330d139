"""The loss curves as an SVG: a few kilobytes of text that every browser and the Hub can show. Pure.

matplotlib was rejected here: the trainer image would carry 30 MB of packages to draw two lines.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from finetune_trainer.training.records import LossPoint

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 44  # margins, in px
MAX_POINTS = 1000
MAX_DOTS = 100
SMOOTHED_FROM = 20
TRAINING_COLOUR, EVALUATION_COLOUR = "#3b6ea5", "#c9772f"


@dataclass(frozen=True)
class _Frame:
    """Range of steps and losses that the picture shows."""

    last_step: int
    low: float
    high: float

    def place(self, point: LossPoint) -> tuple[float, float]:
        """Returns the position of a point in pixels."""
        x = LEFT + (WIDTH - LEFT - RIGHT) * point.step / self.last_step
        return x, self.height_of(point.loss)

    def height_of(self, loss: float) -> float:
        """Returns the height of a loss in pixels from the top."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (loss - self.low) / (self.high - self.low)


def render_loss_plot(title: str, points: Sequence[LossPoint], best_step: int | None = None) -> str:
    """Returns the SVG; `points` must not be empty.

    Of long runs, about 1000 points a line are drawn. A ring marks the evaluation at `best_step`, whose adapter is
    exported.
    """
    ticks = _ticks(min(point.loss for point in points), max(point.loss for point in points))
    frame = _Frame(max(1, max(point.step for point in points)), ticks[0], ticks[-1])
    training = [point for point in points if not point.is_evaluation]
    evaluation = [point for point in points if point.is_evaluation]

    smoothed = _smoothed(training)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'role="img" font-family="system-ui,sans-serif" font-size="12">'
        ),
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
        *_grid(frame, ticks),
        *_line(_thinned(training), frame, TRAINING_COLOUR, opacity=0.3 if smoothed else 1.0),
        *_line(_thinned(smoothed), frame, TRAINING_COLOUR),
        *_line(_thinned(evaluation), frame, EVALUATION_COLOUR),
        # A line of one point is invisible.
        *_dots(evaluation, frame, EVALUATION_COLOUR),
        *_dots(training if len(training) <= 2 else (), frame, TRAINING_COLOUR),
        *_legend(training, evaluation, is_smoothed=bool(smoothed)),
        *(_ring(point, frame) for point in evaluation if point.step == best_step),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _grid(frame: _Frame, ticks: Sequence[float]) -> Iterable[str]:
    for tick in ticks:
        y = frame.height_of(tick)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'

    base = HEIGHT - BOTTOM
    for step in _step_ticks(frame.last_step):
        x, _ = frame.place(LossPoint(step, frame.low))
        yield f'<path d="M{x:.1f} {base}v5" stroke="#888888"/>'
        yield f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{step:,}</text>'
    yield f'<text x="{WIDTH / 2}" y="{base + 36}" text-anchor="middle">optimiser step</text>'


def _line(points: Sequence[LossPoint], frame: _Frame, colour: str, *, opacity: float = 1.0) -> Iterable[str]:
    """Draws a line through the points."""
    if not points:
        return

    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(frame.place, points))
    yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-opacity="{opacity:g}"/>'


def _dots(points: Sequence[LossPoint], frame: _Frame, colour: str) -> Iterable[str]:
    """Marks the points, unless there are too many to be told apart."""
    if len(points) > MAX_DOTS:
        return
    for point in points:
        x, y = frame.place(point)
        said = f"<title>step {point.step}: {point.loss:.4g}</title>"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">{said}</circle>'


def _legend(training: Sequence[LossPoint], evaluation: Sequence[LossPoint], *, is_smoothed: bool) -> Iterable[str]:
    """Names the lines that are drawn, from the right edge on."""
    names = [("evaluation", EVALUATION_COLOUR)] if evaluation else []
    if training:
        names.append((f"training{' (bold: smoothed)' if is_smoothed else ''}", TRAINING_COLOUR))

    x = WIDTH - RIGHT
    for name, colour in names:
        yield f'<text x="{x}" y="20" fill="{colour}" text-anchor="end">{name}</text>'
        x -= 7 * len(name) + 16


def _smoothed(points: Sequence[LossPoint]) -> list[LossPoint]:
    """Returns means over a tenth of the points around each, which lag behind nothing; nothing for a run of fewer than
    20, whose line can be read as it is."""
    if len(points) < SMOOTHED_FROM:
        return []

    sums = list(accumulate((point.loss for point in points), initial=0.0))
    found = []
    for index, point in enumerate(points):
        reach = min(len(points) // 20, index, len(points) - 1 - index)  # as far on both sides
        first, last = index - reach, index + reach + 1
        found.append(LossPoint(point.step, (sums[last] - sums[first]) / (last - first)))
    return found


def _step_ticks(last: int) -> list[int]:
    """Returns about five round steps from 0 to `last`, with `last` itself unless one is close to it."""
    ticks = [int(tick) for tick in _ticks(0, last) if tick == int(tick) and tick <= last]
    return ticks if last - ticks[-1] < (ticks[1] - ticks[0] if len(ticks) > 1 else 1) / 2 else [*ticks, last]


def _ring(point: LossPoint, frame: _Frame) -> str:
    x, y = frame.place(point)
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="{EVALUATION_COLOUR}" stroke-width="2">'
    return f"{circle}<title>exported: step {point.step}</title></circle>"


def _thinned(points: Sequence[LossPoint]) -> Sequence[LossPoint]:
    """Returns every n-th point, and always the last one."""
    step = -(-len(points) // MAX_POINTS) or 1  # rounded up
    return points if step == 1 else [*points[:-1:step], points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """Returns about five round numbers that span [low, high]."""
    # A run with one loss, or with equal losses, still needs a range.
    span = high - low or abs(high) or 1.0
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))

    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [round(index * step, 12) for index in range(first, last + 1)]
