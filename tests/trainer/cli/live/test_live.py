"""A run as its user sees it: the live view's frame and the plain lines, played with a clock of their own."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from finetune_api.vocabulary import Stage
from finetune_client.terminal.sparkline import draw_sparkline
from finetune_trainer.cli.live.follow import follow
from finetune_trainer.cli.live.lines import PlainLines
from finetune_trainer.cli.live.readings import Readings, describe_bytes, describe_seconds
from finetune_trainer.cli.live.view import draw_view
from finetune_trainer.job.progress_tracker import ProgressTracker


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Played:
    """A run without a model: its tracker, its readings and its plain lines."""

    def __init__(self, work: Path) -> None:
        self.clock, self.progress = Clock(), ProgressTracker()
        self.readings = Readings(self.progress, work, self.clock)
        self.console = Console(file=io.StringIO(), width=200)
        self.plain = PlainLines(self.readings, self.console, self.clock)
        self.progress.listen(self.readings.note_change)
        self.progress.listen(self.plain.note_change)

    def step(self, step: int, loss: float, seconds: float = 1.0) -> None:
        """One step of training, as RunCallback reports it."""
        self.clock.now += seconds
        self.progress.update(
            step=step, total_steps=40, epoch=step / 20, eta_seconds=40 - step, tokens_per_second=1234.5
        )
        self.progress.update(loss=loss, learning_rate=2e-4)

    def lines(self) -> list[str]:
        """The lines since the last call."""
        assert isinstance(self.console.file, io.StringIO)
        text = self.console.file.getvalue()
        self.console.file.truncate(0)
        self.console.file.seek(0)
        return text.splitlines()

    def frame(self, width: int = 100) -> str:
        """The live view as text."""
        console = Console(file=io.StringIO(), width=width, record=True)
        console.print(draw_view(self.readings, "my-job", width))
        return console.export_text()


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path)


def test_plain_lines_tell_stages_first_and_last_step_and_one_every_few_seconds(played: Played) -> None:
    played.progress.stage(Stage.MODEL_LOADING)
    played.progress.stage(Stage.TRAINING)
    assert played.lines() == ["ModelLoading: loading the base model", "Training: computing the first step"]

    for step in range(1, 41):
        played.step(step, 3 - step / 20)
    lines = played.lines()
    assert [line.partition(",")[0] for line in lines] == [
        "step 1/40",
        "step 11/40",
        "step 21/40",
        "step 31/40",
        "step 40/40",
    ]
    assert lines[1] == "step 11/40, epoch 0.55, loss 2.4500, 1,234 tokens/s, learning rate 0.0002, about 29 s left"


def test_plain_lines_tell_evaluations_checkpoints_and_a_resumption_at_once(played: Played) -> None:
    played.progress.stage(Stage.TRAINING)
    played.progress.update(resumed_from_step=20)
    played.step(21, 1.5)
    played.lines()
    played.progress.update(eval_loss=1.25)
    played.progress.update(checkpoint_step=21)
    assert played.lines() == [
        "evaluation after step 21: loss 1.2500",
        "resumed from step 20, checkpoint of step 21 is stored",
    ]


def test_when_nothing_moves_the_lines_say_what_is_done(played: Played) -> None:
    played.progress.stage(Stage.TRAINING)
    played.step(1, 2.0)
    played.lines()
    with played.progress.doing("evaluating the held-out rows"):
        played.clock.now += 29
        played.plain.tick()
        assert played.lines() == []
        played.clock.now += 1
        played.plain.tick()
        assert played.lines() == ["evaluating the held-out rows"]
    assert played.readings.activity() == "training"


def test_a_download_shows_its_bytes_and_its_time(played: Played, tmp_path: Path) -> None:
    played.progress.stage(Stage.MODEL_LOADING)
    (tmp_path / "base/.cache").mkdir(parents=True)
    (tmp_path / "base/.cache/model.incomplete").write_bytes(b"0" * 2_500_000)
    assert played.readings.activity() == "downloading the base model: 2.5 MB"
    played.clock.now += 12
    assert played.readings.activity() == "downloading the base model: 2.5 MB, 12 s so far"


def test_the_view_shows_position_curves_figures_and_what_is_done(played: Played) -> None:
    played.progress.stage(Stage.MODEL_LOADING)
    played.progress.stage(Stage.TRAINING)
    for step in range(1, 9):
        played.step(step, 3 - step / 4)
    played.progress.update(eval_loss=1.25, gpu_memory_bytes=3 << 30, checkpoint_step=8)

    frame = played.frame()
    for part in (
        "my-job",
        "✓ model",
        "▸ training",
        "step 8/40, epoch 0.40  ·  about 32 s left",
        "1.0000  █▇▆▅▄▃▂▁",
        "evaluation",
        "1,234 tokens/s  ·  learning rate 0.0002  ·  3.0 GiB GPU memory",
        "checkpoint of step 8 is stored",
        "Ctrl-C",
    ):
        assert part in frame

    with played.progress.doing("taking samples of step 8"):
        assert "taking samples of step 8" in played.frame()


def test_the_view_fits_a_narrow_terminal_and_one_without_any_figure_yet(played: Played) -> None:
    assert "looking for a finished result" in played.frame()
    played.progress.stage(Stage.TRAINING)
    for step in range(1, 30):
        played.step(step, 3 - step / 40)
    assert max(map(len, played.frame(60).splitlines())) <= 60


def test_where_there_is_no_terminal_there_are_lines(tmp_path: Path) -> None:
    progress, console = ProgressTracker(), Console(file=io.StringIO(), width=80)
    with follow(progress, console, "my-job", tmp_path):
        progress.stage(Stage.SAVING)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "Saving: writing adapter, merged weights and GGUF files\n"


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 8, "▁▂▃▄▅▆▇█"),
        ([1, 2, 3, 4, 5, 6, 7, 8], 4, "▁▃▆█"),
        ([5, 5], 8, "▁▁"),
        ([], 8, ""),
        ([1], 0, ""),
    ],
)
def test_a_sparkline(values: list[float], width: int, expected: str) -> None:
    assert draw_sparkline(values, width) == expected


def test_sizes_and_times_in_words() -> None:
    assert [describe_bytes(size) for size in (0, 2_540_000, 1.26e9)] == ["0.0 MB", "2.5 MB", "1.3 GB"]
    assert [describe_seconds(value) for value in (89, 91, 3600, 11_000)] == ["89 s", "2 min", "60 min", "3 h 03 min"]
