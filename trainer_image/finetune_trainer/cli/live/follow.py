"""Shows a run while it lasts: the live view on a terminal, plain lines elsewhere."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, ConsoleRenderable
from rich.live import Live

from finetune_trainer.cli.live.lines import PlainLines
from finetune_trainer.cli.live.readings import Readings
from finetune_trainer.cli.live.view import draw_view
from finetune_trainer.job.progress_tracker import ProgressTracker

FRAMES_PER_SECOND = 4
TICK_SECONDS = 1.0


@contextmanager
def follow(
    progress: ProgressTracker, console: Console, title: str, work: Path, *, is_plain: bool = False
) -> Iterator[None]:
    """Shows the run of `progress` until the code inside ends; `is_plain`: by lines, a terminal or not."""
    readings = Readings(progress, work)
    progress.listen(readings.note_change)

    if console.is_terminal and not is_plain:

        def draw() -> ConsoleRenderable:
            return draw_view(readings, title, console.width)

        # What the program prints meanwhile goes above the frame.
        with Live(get_renderable=draw, console=console, refresh_per_second=FRAMES_PER_SECOND):
            yield
        return

    lines = PlainLines(readings, console)
    progress.listen(lines.note_change)
    ended = threading.Event()
    ticker = threading.Thread(target=_tick, args=(lines, ended), name="plain-lines", daemon=True)
    ticker.start()
    try:
        yield
    finally:
        ended.set()


def _tick(lines: PlainLines, ended: threading.Event) -> None:
    while not ended.wait(TICK_SECONDS):
        lines.tick()
