"""`finetune init` writes a commented manifest that `finetune run` takes as it is."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune_api.job import load_manifest
from finetune_trainer.cli.finetune import main, parse
from finetune_trainer.cli.manifest.read import read_job


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "it's: {a} #row.jsonl"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def init(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["finetune", "init", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "words",
    [
        ("--epochs", "1"),
        ("--eval", "0.1", "--max-steps", "5", "--gguf", "F16", "--gguf", "Q4_K_M", "--merged", "None"),
        ("--data", "it's: {a} #row.jsonl", "--name", "123", "--epochs", "1"),
        ("--epochs", "2.5", "--rank", "8", "--learning-rate", "1e-3", "--quantization", "None", "--gpus", "0"),
    ],
    ids=["nothing more", "evaluation and files", "names that YAML would read otherwise", "every number"],
)
def test_the_manifest_is_the_job_of_the_same_options(
    monkeypatch: pytest.MonkeyPatch, folder: Path, words: Sequence[str]
) -> None:
    words = ("--model", "org/model", "--data", "rows.jsonl", *words)
    assert init(monkeypatch, *words) == 0
    written = read_job(folder / "job.yaml", (), needs_bucket=False).job
    assert written.spec == read_job(None, parse(["run", *words])[1].changes, needs_bucket=False).job.spec
    assert "# " in (folder / "job.yaml").read_text()


def test_with_a_bucket_and_sources_that_a_cluster_reads_it_is_a_clusters_manifest(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    assert init(monkeypatch, "--model", "org/model", "--data", "org/data", "--bucket", "models") == 0
    job = load_manifest((folder / "job.yaml").read_text())  # as strictly as the API server
    assert (job.spec.output.s3.bucket, job.spec.resources.gpus) == ("models", 1)
    assert job.spec.model.source == "hf://org/model"


def test_a_file_is_replaced_only_if_asked_for(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "job.yaml").write_text("mine")
    words = ("--model", "org/model", "--data", "rows.jsonl")
    assert init(monkeypatch, *words) == 10
    assert (folder / "job.yaml").read_text() == "mine"
    assert init(monkeypatch, *words, "--rank", "0", "--force") == 10
    assert (folder / "job.yaml").read_text() == "mine", "an invalid job replaces nothing"
    assert init(monkeypatch, *words, "--force") == 0


def test_where_nobody_can_be_asked_it_says_what_is_missing(folder: Path) -> None:
    program = Path(sys.executable).parent / "finetune"
    done = subprocess.run(
        [program, "init", "--model", "org/model"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 10
    assert done.stderr == "--data: needed where nobody can be asked\n"


def test_on_a_terminal_it_asks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    answers = iter(["org/model", "rows.jsonl", "0.2"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("rich.console.Console.input", lambda *_, **__: next(answers))
    assert init(monkeypatch) == 0
    job = read_job(folder / "job.yaml", (), needs_bucket=False).job
    assert job.spec.dataset.evaluation is not None
    assert job.spec.dataset.evaluation.fraction == 0.2
