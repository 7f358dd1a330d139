"""Words for somebody at a terminal: a hub that is silent, libraries that would chatter."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.failures import FAILURES, FailureReason
from finetune_trainer.cli.local_hints import LOCAL_HINTS, local_hint

FINETUNE = Path(sys.executable).parent / "finetune"


class SilentServer:
    """A server that takes connections and answers none."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.asked: list[float] = []
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self._open.append(self._socket.accept()[0])
            except OSError:
                return
            self.asked.append(time.monotonic())

    def close(self) -> None:
        for each in (self._socket, *self._open):
            each.close()


@pytest.fixture
def silent() -> Iterator[SilentServer]:
    server = SilentServer()
    yield server
    server.close()


def test_a_hub_that_is_silent_is_said_within_ten_seconds(silent: SilentServer, tmp_path: Path) -> None:
    words = [FINETUNE, "validate", "--model", "org/x", "--data", "org/y", "--output", "out"]
    environment = os.environ | {"HF_ENDPOINT": silent.address}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        line = next(line for line in program.stderr if "did not answer" in line)
        said = time.monotonic()
        program.kill()
    assert line.startswith("note: hf://org/x: the hub did not answer (ReadTimeout); trying again in")
    assert said - silent.asked[0] < 10


@pytest.mark.parametrize("reason", [reason for reason in FailureReason if FAILURES[reason].exit_code is not None])
def test_hints_on_this_machine_speak_of_no_pod(reason: FailureReason) -> None:
    if reason is FailureReason.INTERRUPTED:  # `finetune run` tells itself how to go on
        return
    hint = local_hint(reason)
    for word in ("pod", "Secret", "create the job", "tried again", "ephemeralStorage", "spec.resources.memory"):
        assert word not in hint


def test_the_local_hints_are_other_than_the_clusters() -> None:
    assert all(FAILURES[reason].hint != hint for reason, hint in LOCAL_HINTS.items())


SAID_AND_NOT_SAID = """
import logging
from finetune_trainer.job.logging_setup import configure_screen_logging

said = []
configure_screen_logging(said.append, verbose=False)
import torch, transformers  # the first time in this process, as in the command

logging.getLogger("finetune_trainer.storage.retry").warning("a store is silent")
logging.getLogger("finetune_trainer.cli.pod").error("ModelNotFound: what the outcome tells")
for library in ("bitsandbytes.backends.cpu.ops", "transformers", "torch", "torch._dynamo", "httpx"):
    logging.getLogger(library).warning("chatter")
try:
    raise ZeroDivisionError
except ZeroDivisionError as error:
    logging.getLogger("finetune_trainer.cli.pod").error("a defect", exc_info=error)
print(said[0], len(said), "Traceback" in said[-1])
"""


def test_our_warnings_are_said_and_those_of_libraries_are_not() -> None:
    """Looked at in a process of its own: here, transformers was imported long ago and has set its loggers up."""
    done = subprocess.run([sys.executable, "-c", SAID_AND_NOT_SAID], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "note: a store is silent 2 True\n"


def test_a_run_leaves_nothing_of_libraries_on_the_screen(tmp_path: Path, tiny_base: Path, chat_file: Path) -> None:
    words = ["--model", tiny_base, "--data", chat_file, "--name", "mine", "--max-steps", "2", "--gpus", "0"]
    words += ["--set", "spec.model.maxSequenceLength=128", "--set", "spec.training.batchSize=1", "--output", "out"]
    done = subprocess.run([FINETUNE, "run", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    beginnings = ("note: ", "ModelLoading: ", "AdapterInjection: ", "DataFormatting: ", "TrainingConfiguration: ")
    beginnings += ("Training: ", "step ", "checkpoint of step ", "Saving: ", "Uploading: ", "manifest: ")
    beginnings += ("loss on the same ", "next: ", "      ")
    assert [line for line in done.stderr.splitlines() if not line.startswith(beginnings)] == []
    assert list(tmp_path.glob("out/mine/attempts/*/metrics/metrics.jsonl"))
