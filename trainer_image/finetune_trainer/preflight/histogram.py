"""The histogram of token lengths, as SVG. Pure: numbers in, markup out."""

from math import floor, log10

from finetune_trainer.preflight.report import HistogramBin, TokenStatistics

WIDTH, HEIGHT = 760, 220  # px
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 14, 24  # px around the bars
LINES = 4


def draw_histogram(tokens: TokenStatistics, limit: int) -> str:
    """Bars of rows by tokens; those beyond `limit` tokens are cut in training."""
    grid = _round_step(max(entry.rows for entry in tokens.histogram) / LINES)
    most = grid * LINES
    step = (WIDTH - LEFT - RIGHT) / len(tokens.histogram)
    parts = [_grid(grid)]
    for index, entry in enumerate(tokens.histogram):
        parts.append(_bar(entry, LEFT + index * step, step, most, is_cut=entry.last > limit))
    shown = max(1, len(tokens.histogram) // 6)
    for index in range(0, len(tokens.histogram), shown):
        x = LEFT + index * step
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}">{tokens.histogram[index].first:,}</text>')
    title = f"<title>Rows by tokens, from {tokens.histogram[0].first} to {tokens.histogram[-1].last}</title>"
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{title}{"".join(parts)}</svg>'
    orange = f" Orange: rows of more than {limit:,} tokens, which are cut." if tokens.truncated_share else ""
    last = tokens.histogram[-1]
    note = f'<p class="note">The last bar takes all from {last.first:,} to {last.last:,} tokens.{orange}</p>'
    return f"<h2>Tokens per row</h2>{picture}{note}"


def _round_step(step: float) -> int:
    """The next of 1, 2, 2.5, 5, 10, 20, 25, ... that is whole and at least `step`."""
    power = 10 ** max(0, floor(log10(max(step, 1.0))))
    return next(int(digit * power) for digit in (1, 2, 2.5, 5, 10) if digit * power >= step and digit * power % 1 == 0)


def _grid(step: int) -> str:
    parts = []
    for index in range(LINES + 1):
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * index / LINES
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(step * index)}</text>')
    return "".join(parts)


def _bar(entry: HistogramBin, x: float, width: float, most: int, *, is_cut: bool) -> str:
    height = (HEIGHT - TOP - BOTTOM) * entry.rows / most
    kind = ' class="cut"' if is_cut else ""
    return (
        f'<rect{kind} x="{x + 1:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" width="{max(1.0, width - 2):.1f}" '
        f'height="{height:.1f}"><title>{entry.first:,} to {entry.last:,} tokens: {entry.rows:,} rows</title></rect>'
    )


def _short(count: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
