"""Ctrl-C in `finetune run`: answered at once, ended in order, and a second one ends it now; no file is left behind."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_test_models import chat_data

FINETUNE = Path(sys.executable).parent / "finetune"
MANIFEST = """
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {{name: mine}}
spec:
  model: {{source: "file://{base}", maxSequenceLength: 128}}
  dataset: {{source: "file://{data}"}}
  training: {{maxSteps: {steps}, batchSize: 1, gradientAccumulation: {accumulation}, learningRate: 1e-3{more}}}
  export: {{merged: None, gguf: []}}
  output: {{s3: {{bucket: models}}}}
  resources: {{gpus: 0}}
"""
PROMPTS = [f"Tell me about the number {number}." for number in range(32)]
SAMPLES = f", samples: {{maxTokens: 4096, prompts: {PROMPTS}}}"
"""Minutes of sampling: an answer that ends early, by chance or on a fast machine, leaves others that do not."""


class Terminal:
    """A running `finetune run`, with what it has printed so far."""

    def __init__(self, folder: Path, manifest: str) -> None:
        (folder / "job.yaml").write_text(manifest)
        (folder / "tmp").mkdir(exist_ok=True)
        self.temporary = folder / "tmp"
        words = [str(FINETUNE), "run", str(folder / "job.yaml"), "--output", str(folder / "out"), "--verbose"]
        self.log = (folder / "log").open("w+")
        environment = {"TMPDIR": str(folder / "tmp"), "PATH": "/usr/bin:/bin", "HOME": str(folder), "COLUMNS": "200"}
        self.process = subprocess.Popen(words, stdout=self.log, stderr=self.log, env=environment)

    def text(self) -> str:
        return Path(self.log.name).read_text()

    def wait_for(self, part: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while part not in self.text():
            assert time.monotonic() < end, f"{part!r} did not come:\n{self.text()}"
            assert self.process.poll() is None or part in self.text(), self.text()
            time.sleep(0.02)

    def press(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def code(self, seconds: float) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def opened() -> Iterator[list[Terminal]]:
    terminals: list[Terminal] = []
    yield terminals
    for terminal in terminals:
        terminal.process.kill()
        terminal.process.wait()
        terminal.log.close()


@pytest.mark.long
def test_a_run_stops_after_its_step_and_goes_on_from_there(
    opened: list[Terminal], tmp_path: Path, tiny_base: Path, chat_file: Path
) -> None:
    manifest = MANIFEST.format(base=tiny_base, data=chat_file, steps=400, accumulation=1, more="")
    opened.append(first := Terminal(tmp_path, manifest))
    first.wait_for("step 3", 400)
    first.press()
    first.wait_for("stopping after this step, with a checkpoint; press Ctrl-C again to stop now", 15)
    assert first.code(60) == 30
    assert "run the same command to go on from step" in first.text()
    assert not list(first.temporary.glob("finetune-*"))

    opened.append(second := Terminal(tmp_path, manifest))
    second.wait_for("resuming from the checkpoint of step", 400)
    second.press()
    assert second.code(60) == 30


def test_samples_before_the_first_step_end_between_two_tokens(
    opened: list[Terminal], tmp_path: Path, tiny_base: Path, chat_file: Path
) -> None:
    manifest = MANIFEST.format(base=tiny_base, data=chat_file, steps=4, accumulation=1, more=SAMPLES)
    opened.append(terminal := Terminal(tmp_path, manifest))
    terminal.wait_for("taking samples of the model before training", 400)
    time.sleep(1)
    terminal.press()
    assert terminal.code(60) == 30
    assert "run the same command to begin again" in terminal.text()


@pytest.mark.long
def test_a_second_press_ends_a_long_step_now(opened: list[Terminal], tmp_path: Path, tiny_base: Path) -> None:
    """The step is a minute long: an epoch bounds what one step can accumulate, so its data must be long as well."""
    data = chat_data.write_jsonl(tmp_path / "long.jsonl", 4000)
    manifest = MANIFEST.format(base=tiny_base, data=data, steps=4, accumulation=1000, more="")
    opened.append(terminal := Terminal(tmp_path, manifest))
    terminal.wait_for("stage Training\n", 400)
    time.sleep(2)
    terminal.press()
    terminal.wait_for("press Ctrl-C again to stop now", 15)
    with pytest.raises(subprocess.TimeoutExpired):
        terminal.code(1)

    terminal.press()
    assert terminal.code(15) == 130
    assert not list(terminal.temporary.glob("finetune-*"))
    assert not list((tmp_path / "out").rglob("attempts/*/*"))
