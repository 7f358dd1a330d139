"""`finetune` as a user calls it: errors with their paths, all at once; a run into a folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_trainer.cli.finetune import VERBS, parse

FINETUNE = Path(sys.executable).parent / "finetune"
MANIFEST = """
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {{name: mine}}
spec:
  model: {{source: "file://{base}", maxSequenceLength: 128}}
  dataset: {{source: "file://{data}"}}
  training: {{maxSteps: 2, batchSize: 1, gradientAccumulation: 1, learningRate: 1e-3}}
  export: {{merged: None, gguf: [Q8_0]}}
  output: {{s3: {{bucket: models}}}}
  resources: {{gpus: 0}}
"""


HELP_ALONE = """
import contextlib, sys
from finetune_trainer.cli.finetune import parse
with contextlib.suppress(SystemExit):
    parse(["--help"])
print("imported:", *(name for name in ("torch", "numpy", "boto3", "pydantic", "yaml") if name in sys.modules))
"""


def finetune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(FINETUNE), *arguments], capture_output=True, text=True, check=False, timeout=240)


def test_help_gives_an_example_of_every_verb_and_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", HELP_ALONE], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert f"  finetune {verb}" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported:"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_options_with_examples_that_it_takes(verb: str) -> None:
    done = finetune(verb, "--help")
    assert done.returncode == 0
    examples = done.stdout.partition("examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        assert parse(shlex.split(example)[1:])[0] == verb


def test_the_version_names_the_parts_and_imports_none_of_them() -> None:
    done = finetune("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"finetune \d+\.\d+\.\d+ \(torch .*, transformers .*, bitsandbytes .*\)\n", done.stdout)


@pytest.mark.parametrize(
    "words", [(), ("no-such-verb",), ("validate",), ("validate", "a", "b"), ("run", "a", "--typo")], ids=" ".join
)
def test_words_that_no_verb_takes_end_with_the_usage(words: tuple[str, ...]) -> None:
    done = finetune(*words)
    assert done.returncode == 2
    assert "usage: finetune" in done.stderr


def test_every_error_is_reported_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    text = MANIFEST.format(base="/m", data="/d").replace("maxSteps: 2", "maxSteps: 0, typo: 1").replace("models", "M/x")
    path.write_text(text)
    done = finetune("validate", str(path))
    assert done.returncode == 10
    lines = done.stderr.splitlines()
    assert [line.partition(": found")[0].partition(": there")[0] for line in lines] == [
        f"{path}:8: spec.training.maxSteps",
        f"{path}:8: spec.training.typo",
        f"{path}:10: spec.output.s3.bucket",
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [("a: [", "job.yaml:1: while parsing"), ("a: 1\na: 2", "job.yaml:2: key 'a' is written twice")],
    ids=["no YAML", "a key twice"],
)
def test_text_that_is_no_manifest_is_explained(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    done = finetune("validate", str(path))
    assert done.returncode == 10
    assert part in done.stderr


def test_a_run_writes_a_folder_and_shows_a_table(tmp_path: Path, tiny_base: Path, chat_file: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(MANIFEST.format(base=tiny_base, data=chat_file))
    done = finetune("run", str(path), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "Q8_0" in done.stdout
    assert (tmp_path / "out/mine/manifest.json").is_file()
    again = finetune("run", str(path), "--output", str(tmp_path / "out"))
    assert "it was there already" in again.stderr


def test_a_failed_run_says_why_and_what_to_do(tmp_path: Path, tiny_base: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(MANIFEST.format(base=tiny_base, data=tmp_path / "absent.jsonl"))
    done = finetune("run", str(path), "--output", str(tmp_path / "out"))
    assert done.returncode == 12
    assert "DatasetNotFound" in done.stderr
    assert "Check spec.dataset.source" in done.stderr
