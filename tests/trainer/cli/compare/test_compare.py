"""`finetune compare` shows what two jobs made and where their configurations differ."""

import json
import shutil
from pathlib import Path

import pytest

from finetune_test_models.taught_runs import Taught
from finetune_trainer.cli.compare import command
from finetune_trainer.cli.compare.command import SAME, compare_here
from finetune_trainer.cli.compare.figures import compare_samples
from finetune_trainer.cli.compare.read_result import ReadResult
from finetune_trainer.cli.finetune import parse
from finetune_trainer.training.metrics_log import METRICS_FILE
from finetune_trainer.training.records import SampleLine


def compare(*words: str | Path) -> int:
    return compare_here(parse(["compare", *map(str, words)])[1])


@pytest.fixture
def other(taught: Taught, tmp_path: Path) -> Path:
    """A result of the same job with another learning rate, that learned less."""
    folder = tmp_path / "other"
    shutil.copytree(taught.folder / "tiny", folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["configuration"]["run"]["training"]["learningRate"] = 0.25
    manifest["metrics"]["loss"] = 4.5
    for artifact in manifest["artifacts"]:
        if artifact.get("quantization") == "Q2_K" and artifact["type"] == "GGUF":
            artifact |= {"loss": 5.5, "improvementKept": 0.25}
    path.write_text(json.dumps(manifest))
    return folder


def test_losses_metrics_curves_and_configuration_are_side_by_side(
    taught: Taught, other: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.tables, "_width", 200)
    assert compare(taught.folder, other) == 0
    lines = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    rows = {cells[1]: cells[2:4] for cells in lines if len(cells) == 5}
    assert taught.manifest.judgement is not None
    base = f"{taught.manifest.judgement.base_loss:.4f}".rstrip("0")
    assert rows["loss of the base"] == [base, base]
    assert rows["last loss"][1] == "4.5"
    assert rows["last loss"][0] != "4.5"
    found = taught.found["Q2_K"]
    assert rows["loss of Q2_K"] == [
        f"{found.loss:.4f}".rstrip("0") + f" (keeps {found.improvement_kept:.0%})",
        "5.5 (keeps 25%)",
    ]
    assert rows["training.learningRate"] == ["0.005", "0.25"]
    assert "training.maxSteps" not in rows
    assert rows["loss curve"][0][0] == "█"
    assert "▁" in rows["loss curve"][0]
    assert rows["steps"] == ["60", "60"]


def test_the_last_answer_to_each_prompt_is_shown(taught: Taught) -> None:
    def side(*answers: tuple[int, str, str]) -> ReadResult:
        lines = [
            SampleLine(step=step, prompt=prompt, answer=text, tokens=1, finished=True) for step, prompt, text in answers
        ]
        return ReadResult("x", taught.manifest, (), tuple(lines))

    first, second = side((0, "a", "early"), (9, "a", "late")), side((9, "a", "other"), (9, "b", "[red]new"))
    assert compare_samples(first, second) == [("a", "late", "other"), ("b", "-", "[red]new")]


def test_a_result_beside_itself_differs_in_nothing(taught: Taught, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(taught.folder, taught.folder / "tiny") == 0
    assert SAME in capsys.readouterr().out


def test_a_result_without_metrics_has_no_curve(taught: Taught, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in other.rglob(METRICS_FILE):
        path.unlink()
    assert compare(other, other) == 0
    assert "loss curve" not in capsys.readouterr().out


def test_what_is_no_result_is_said(taught: Taught, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(taught.folder, tmp_path) != 0
    assert "manifest.json does not exist" in capsys.readouterr().err
