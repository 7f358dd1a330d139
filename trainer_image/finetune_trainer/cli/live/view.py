"""The live view of a run: one frame that is drawn anew a few times a second. Pure but for the clock of the readings."""

from collections.abc import Sequence

from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_api.vocabulary import Stage
from finetune_client.terminal.sparkline import draw_sparkline
from finetune_trainer.cli.live.readings import STAGES, Readings, describe_seconds

WIDTH = 100
CURVE_WIDTH = 56


def draw_view(readings: Readings, title: str, width: int = WIDTH) -> Panel:
    """Returns the frame of this moment, at most `width` columns wide."""
    width = min(width, WIDTH)
    progress = readings.progress
    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(ratio=1, no_wrap=True, overflow="ellipsis")

    rows.add_row("stages", _draw_stages(progress.current_stage))
    rows.add_row("done", _draw_bar(readings))
    if position := readings.position():
        rows.add_row("position", Text(_join([position, readings.remaining()])))
    curve_width = min(CURVE_WIDTH, width - 36)
    for name, points, style in (("loss", readings.losses, "cyan"), ("evaluation", readings.eval_losses, "yellow")):
        if points:
            rows.add_row(name, _draw_curve(points, style, curve_width))

    if figures := list(readings.figures()):
        rows.add_row("figures", Text(_join(figures)))
    rows.add_row("now", Text(readings.activity(), style="bold"))
    if checkpoints := readings.checkpoints():
        rows.add_row("kept", Text(checkpoints))
    hint = "Ctrl-C stops the run, with a checkpoint once it trains"
    return Panel(rows, title=Text(title), subtitle=hint, width=width, border_style="blue")


def _draw_stages(current: Stage | None) -> Text:
    """All stages in order: those that are done, the one that runs, those to come."""
    line = Text()
    stages = list(STAGES)
    reached = stages.index(current) if current in stages else -1

    for index, stage in enumerate(stages):
        mark, style = ("✓ ", "green") if index < reached else ("▸ ", "bold") if index == reached else ("  ", "dim")
        line.append(f"{mark}{STAGES[stage][0]}  ", style=style)
    return line


def _draw_bar(readings: Readings) -> Table:
    percent = readings.progress.percent()
    row = Table.grid(padding=(0, 1))
    row.add_row(
        ProgressBar(total=100, completed=percent, width=40),
        f"{percent} %",
        Text(f"after {describe_seconds(readings.elapsed())}", style="dim"),
    )
    return row


def _draw_curve(points: Sequence[tuple[int, float]], style: str, width: int) -> Text:
    """The newest value, the curve, and the lowest value where that is another one."""
    values = [value for _, value in points]
    line = Text(f"{values[-1]:.4f}  ")
    line.append(draw_sparkline(values, width), style=style)

    lowest = min(points, key=lambda point: point[1])
    if lowest[1] < values[-1]:
        line.append(f"  lowest {lowest[1]:.4f}", style="dim")
    return line


def _join(parts: Sequence[str]) -> str:
    return "  ·  ".join(part for part in parts if part)
