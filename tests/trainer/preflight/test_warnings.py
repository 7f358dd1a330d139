"""docs/warnings.md is right: every manifest there provokes its warning, word for word, and no warning is left out."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.run_config import JobIdentity, RunConfig
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_test_models import tiny_runs
from finetune_trainer.cli.preflight import summarize
from finetune_trainer.job.settings import Settings
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.preflight.html import render_html
from finetune_trainer.preflight.judgements.training import JUDGEMENTS
from finetune_trainer.preflight.report import Report

texts, tiny_base = tiny_runs.texts, tiny_runs.tiny_base
PAGE = Path(__file__).parents[3] / "docs/warnings.md"
EVALUATION_ROWS = 20
"""Rows of evaluation.jsonl: the first half are rows that train."""


@dataclass(frozen=True)
class Line:
    """One line of the page's table."""

    warning: str
    rows: int
    manifest: str
    place: str
    message: str


def lines() -> Iterator[Line]:
    for text in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        if text.startswith("|") and cells[1].isdigit():
            name, rows, manifest, place, message = cells
            yield Line(name, int(rows), manifest.strip("`"), place, message)


LINES = list(lines())


def conversation(number: int) -> str:
    asked, answered = (f"{words} number {number}" for words in ("what is the answer to question", "the answer to"))
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return json.dumps({"messages": turns}) + "\n"


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    """The models that the page names; data come later, as each line has its own."""
    for name in ("tiny", "tiny-base", "without-template"):
        shutil.copytree(tiny_base, tmp_path / "models" / name)
    plain = tmp_path / "models/without-template"
    (plain / "chat_template.jinja").unlink()
    (tmp_path / "data").mkdir()
    return tmp_path


def check(folder: Path, rows: int, manifest: str) -> Report:
    """The report on a job with all defaults but for `manifest`; file:/// leads into `folder`."""
    texts = [conversation(number) for number in range(rows)]
    # Repeated rows are at the end: a manifest says how many with maxSamples.
    (folder / "data/rows.jsonl").write_text("".join(texts))
    (folder / "data/twice.jsonl").write_text("".join(texts + texts))
    others = [conversation(number) for number in range(10_000, 10_000 + EVALUATION_ROWS // 2)]
    (folder / "data/evaluation.jsonl").write_text("".join(texts[: EVALUATION_ROWS // 2] + others))

    spec: dict[str, Any] = {
        "model": {"source": "file:///models/tiny"},
        "dataset": {"source": "file:///data/rows.jsonl"},
    }
    for section, fields in (yaml.safe_load(manifest) or {}).items():
        spec[section] = spec.get(section, {}) | fields
    text = json.dumps(spec | {"output": {"s3": {"bucket": "models"}}}).replace("file:///", f"file://{folder}/")
    job = JobIdentity(namespace="default", name="tiny", uid="uid-1")
    config = RunConfig.from_spec(job, FineTuneJobSpec.model_validate_json(text), None)
    return run_preflight(config, Settings(folder / "work", "attempt-1", output_folder=folder / "out"))[0]


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.warning}: {line.manifest}")
def test_a_manifest_of_the_page_provokes_its_warning(folder: Path, line: Line) -> None:
    report = check(folder, line.rows, line.manifest)
    assert report.errors() == ()
    assert (line.place, line.message) in [(found.location, found.message) for found in report.warnings()]


def test_every_warning_has_a_line() -> None:
    assert {line.warning for line in LINES} == {judge.__name__.replace("_", " ") for judge in JUDGEMENTS}


def test_a_usual_job_has_none_of_them(folder: Path) -> None:
    report = check(folder, 240, "{dataset: {packing: false, evaluation: {fraction: 0.1}}, training: {epochs: 2}}")
    places = {line.place for line in LINES} - {"spec.model.source"}
    assert [found for found in report.warnings() if found.location in places or "base model" in found.message] == []


def test_warnings_reach_the_page_and_the_status(folder: Path) -> None:
    report = check(folder, 80, "{}")
    page, status = render_html(report), summarize(report, None)
    said = re.sub(r"\s+", " ", page)
    assert all(warning.message in said for warning in report.warnings())
    assert status.warning_count == len(report.warnings())
    assert status.warnings[0] == f"{report.warnings()[0].location}: {report.warnings()[0].message}", "uncut"
