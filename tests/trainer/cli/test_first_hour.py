"""The commands of docs/first-hour.md, run one after the other as they stand there, on a tiny model of the same name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from house import CHECKOUT

from finetune_test_models.tiny_runs import conversations, write_rows

PAGE = (CHECKOUT / "docs/first-hour.md").read_text()
MODEL = "Qwen/Qwen3-0.6B"  # a path that exists comes before a name on the Hub
ERRORS = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata:
  name: job
spec:
  model:
    source: org/model
  dataset:
    source: org/data
  adapter:
    rank: 16
  training:
    epochs: 1
    batch_size: 2
  export:
    gguf:
      - q4_k_m
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    """A working directory with the page's model and data."""
    shutil.copytree(tiny_base, tmp_path / MODEL)
    write_rows(tmp_path / "train.jsonl", conversations(24))
    return tmp_path


def run(words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", "-c", words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=280
    )


@pytest.mark.timeout(1200)  # two runs, on a machine that may be busy
def test_every_command_of_the_page_succeeds(folder: Path) -> None:
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 7
    for command in commands:
        done = run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "kernels-community" not in done.stderr, "a library's advice"

    assert (folder / "results/first/manifest.json").is_file()
    assert (folder / "results/second/manifest.json").is_file()
    assert list(folder.glob("results/first/attempts/*/metrics/tensorboard/events.out.tfevents.*"))


def test_the_errors_of_the_page_are_those_of_the_command(folder: Path) -> None:
    (folder / "job.yaml").write_text(ERRORS)
    done = run("finetune validate job.yaml --output results", folder)
    assert done.returncode == 10
    assert f"```text\n{done.stderr}```" in PAGE
