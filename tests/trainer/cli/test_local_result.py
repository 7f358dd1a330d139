"""A result in a folder is where one looks, and costs no second copy."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.outcome import Artifact
from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer.cli.local_result import link_newest, next_commands, shown_path

FINETUNE = "from finetune_trainer.cli.finetune import main; main()"
MANIFEST = """
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {{name: mine}}
spec:
  model: {{source: "file://{base}", maxSequenceLength: 128}}
  dataset: {{source: "file://{rows}"}}
  adapter: {{rank: 4}}
  training: {{maxSteps: 2, checkpointSteps: 1, batchSize: 1, gradientAccumulation: 1, learningRate: 0.001}}
  export: {{merged: BF16, gguf: [Q8_0]}}
  runPolicy: {{keepCheckpointsAfterSuccess: {keep}}}
  resources: {{gpus: 0}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"), texts=["one two three four five six seven"] * 40)


def run(work: Path, base: Path, *, keep: bool) -> str:
    """`finetune run` in a process of its own; returns what it printed."""
    rows = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]}] * 8
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "job.yaml").write_text(MANIFEST.format(base=base, rows=work / "rows.jsonl", keep=str(keep).lower()))
    command = [sys.executable, "-P", "-c", FINETUNE, "run", "job.yaml", "--output", "out"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.sub(r"\s+", " ", done.stdout + done.stderr)


def test_a_run_leaves_its_result_where_one_looks_and_nothing_else(base: Path, tmp_path: Path) -> None:
    said = run(tmp_path, base, keep=False)
    folder = tmp_path / "out" / "mine"
    assert (folder / "gguf/mine-Q8_0.gguf").is_file()
    assert (folder / "adapter").is_symlink()
    assert (folder / "merged/config.json").is_file()
    assert not (folder / "checkpoints").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"], "the work folder is gone"
    assert "next: finetune chat out/mine" in said
    assert "out/mine/gguf/mine-Q8_0.gguf" in said

    first = (folder / "adapter").resolve()
    (tmp_path / "job.yaml").unlink()
    run(tmp_path, base, keep=True)  # the manifest differs, but not the result: it is taken as it is
    assert (folder / "adapter").resolve() == first


def test_checkpoints_are_kept_if_the_job_says_so(base: Path, tmp_path: Path) -> None:
    run(tmp_path, base, keep=True)
    assert list((tmp_path / "out/mine/checkpoints").rglob("checkpoint.json"))


def test_links_lead_to_the_newest_and_leave_other_files_alone(tmp_path: Path) -> None:
    for attempt, part in (("a", "gguf"), ("a", "samples"), ("b", "gguf"), ("b", "merged")):
        (tmp_path / "attempts" / attempt / part).mkdir(parents=True)
    (tmp_path / "merged").mkdir()
    link_newest(tmp_path, "a")
    link_newest(tmp_path, "b")
    assert (tmp_path / "gguf").readlink() == Path("attempts/b/gguf")
    assert not (tmp_path / "samples").exists()
    assert not (tmp_path / "merged").is_symlink()
    assert shown_path(f"{tmp_path}/attempts/b/gguf", "b") == f"{tmp_path}/gguf"
    assert shown_path(f"{tmp_path}/attempts/b/merged", "b") == f"{tmp_path}/attempts/b/merged"
    assert shown_path("s3://models/attempts/b/gguf", "b") == "s3://models/attempts/b/gguf"


def test_the_next_commands_name_what_is_there() -> None:
    modelfile = Artifact(type="Modelfile", uri="x", bytes=1, sha256="0" * 64, format="modelfile")
    assert next_commands(Path("out/mine"), "mine", [], []) == ["finetune chat out/mine"]
    assert next_commands(Path("out/mine"), "mine", [modelfile], ["out/mine/gguf/Modelfile"]) == [
        "finetune chat out/mine",
        "ollama create mine -f out/mine/gguf/Modelfile",
    ]
