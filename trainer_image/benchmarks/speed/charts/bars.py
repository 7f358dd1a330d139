"""Bars of speed and memory as an SVG file, drawn with matplotlib.

Each row of the benchmark has a panel: tokens per second to the left, peak memory to the right, both from zero. The
same results give the same bytes on every machine: the file carries no date and no version, ids come from a fixed salt,
and text stays text, laid out by the font that matplotlib ships. A style sheet turns the colours for dark pages.
"""

import io
from collections.abc import Mapping, Sequence

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from speed.charts.labels import LABELS, in_order
from speed.results import Summary, ratio

WIDTH, LINE, HEAD, FOOT = 700, 20, 58, 36
"""Points: the picture's width, the height of a bar with its gap, of a panel's head, and of the caption's line."""
LEFT = 0.026
"""Share of the width to the left of titles."""
SPEED_FROM, SPEED, MEMORY_FROM, MEMORY = 0.275, 0.44, 0.745, 0.23
"""Where the bars of speed and of memory begin, and how wide their axes are, as shares of the width."""
ROOM = {"speed": 1.36, "memory": 1.24}
"""Length of an axis over its longest bar: the number behind the bar needs the rest."""
PAGE, TEXT, DIM, LINES, OURS, PEER = "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#0969da", "#9aa4af"
DARK = {PAGE: "#0d1117", TEXT: "#f0f6fc", DIM: "#9198a1", LINES: "#3d444d", OURS: "#4493f8", PEER: "#656c76"}
"""Colours on dark pages."""
STYLE = {
    "svg.hashsalt": "finetune-operator",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.5,
    "text.color": TEXT,
    "axes.edgecolor": LINES,
}


def draw(panels: Mapping[str, Sequence[Summary]], caption: str) -> str:
    """Returns the SVG file: one panel for each title, and `caption` below them."""
    height = sum(HEAD + LINE * len(summaries) for summaries in panels.values()) + FOOT
    with style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor=PAGE)  # 72 points to the inch

        top = height
        for number, (title, summaries) in enumerate(panels.items()):
            _draw_panel(figure, number, title, in_order(summaries), top / height)
            top -= HEAD + LINE * len(summaries)
        figure.text(LEFT, 14 / height, caption, color=DIM, size=8.5)

        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _with_dark_colours(file.getvalue())


def _draw_panel(figure: Figure, number: int, title: str, summaries: Sequence[Summary], top: float) -> None:
    height = figure.get_figheight() * 72
    bottom = top - (HEAD + LINE * len(summaries)) / height
    figure.text(LEFT, top - 27 / height, title, weight="bold", size=11)

    bars = LINE * len(summaries) / height
    speed = figure.add_axes((SPEED_FROM, bottom, SPEED, bars))
    memory = figure.add_axes((MEMORY_FROM, bottom, MEMORY, bars))

    _draw_bars(speed, number, "speed", {one.system: one.tokens_per_second for one in summaries})
    _draw_bars(memory, number, "memory", {one.system: one.peak_gib for one in summaries})
    speed.set_title("tokens per second (more is better)", loc="left", color=DIM, size=8.5)
    memory.set_title("peak GiB (less is better)", loc="left", color=DIM, size=8.5)

    for line, one in enumerate(summaries):
        share = ratio(summaries, one, "unsloth-max") if _is_ours(one.system) else None
        words = f"{one.tokens_per_second:,.0f}" + ("" if share is None else f"  ({share:.2f}x)")

        _write(speed, one, (0, line), LABELS[one.system], before=True)
        _write(speed, one, (one.tokens_per_second, line), words)
        _write(memory, one, (one.peak_gib, line), f"{one.peak_gib:.1f}")


def _write(axes: Axes, summary: Summary, at: tuple[float, float], words: str, *, before: bool = False) -> None:
    """Writes words about a system behind a point, or before it; those about this project in bold."""
    axes.annotate(
        words,
        at,
        xytext=(-6 if before else 5, 0),
        textcoords="offset points",
        va="center_baseline",
        ha="right" if before else "left",
        weight="bold" if _is_ours(summary.system) else "normal",
    )


def _draw_bars(axes: Axes, number: int, kind: str, values: Mapping[str, float]) -> None:
    """Draws a bar for each system, from the top down, as a group with the id bar-<panel>-<kind>-<system>."""
    colours = [OURS if _is_ours(system) else PEER for system in values]
    bars = axes.barh(range(len(values)), list(values.values()), height=0.64, color=colours)
    for bar, system in zip(bars, values, strict=True):
        bar.set_gid(f"bar-{number}-{kind}-{system}")

    axes.set(xlim=(0, max(values.values()) * ROOM[kind]), ylim=(len(values) - 0.4, -0.6))
    axes.set(xticks=[], yticks=[], facecolor="none")
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _is_ours(system: str) -> bool:
    return system.startswith("ours")


def _with_dark_colours(svg: str) -> str:
    """Adds a style sheet for dark pages; it has to outweigh matplotlib's style attributes."""
    rules = [
        f'  [style*="{name}: {light}"] {{ {name}: {dark} !important }}'
        for light, dark in DARK.items()
        for name in ("fill", "stroke")
    ]
    sheet = "\n".join(["@media (prefers-color-scheme: dark) {", *rules, "}"])
    head, defs, rest = svg.partition("<defs>")
    return f"{head}<style>\n{sheet}\n</style>\n{defs}{rest}"
