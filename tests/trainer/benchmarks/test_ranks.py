"""Processes of a measurement on several GPUs: torchrun, the word to begin, and their common end."""

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from speed import children
from speed.children import Child, MeasurementError

PROGRAM = """
import os, sys, time
from speed import ranks
def say(line):
    os.write(1, (line + "\\n").encode())  # in one piece, beside what the other process and libraries write
ranks.launch("measured", 2)
say(f"imported {ranks.local_rank()}")
ranks.await_go()
say(f"began {ranks.local_rank()} {os.getpid()} {sys.flags.safe_path}")
import torch.distributed as dist
dist.init_process_group("gloo")
largest = ranks.largest(10 + ranks.local_rank())
if ranks.is_first():
    say('RESULT {"largest": %d}' % largest)
time.sleep(60)
"""


@pytest.fixture
def measured(tmp_path: Path) -> Child:
    (tmp_path / "measured.py").write_text(PROGRAM)
    places = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return Child([sys.executable, "-P", "-m", "measured"], tmp_path / "log", os.environ | {"PYTHONPATH": places})


def test_processes_wait_for_one_word_give_one_result_and_end_together(measured: Child, tmp_path: Path) -> None:
    log = tmp_path / "log"
    _wait_for(lambda: log.read_text().count("imported") == 2)
    time.sleep(0.5)
    assert "began" not in log.read_text()

    measured.go()
    lines: list[str] = []
    found: dict[str, Any] = measured.result(60, lines.append)
    assert found == {"largest": 11}

    # Libraries write no whole lines.
    began = re.findall(r"began (\d) (\d+) (\w+)", "\n".join(lines))
    assert sorted(rank for rank, _, _ in began) == ["0", "1"]
    assert {safe for *_, safe in began} == {"True"}
    for _, pid, _ in began:  # torchrun gives each a session of its own
        _wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


def test_a_process_that_says_no_more_and_does_not_end_is_a_failed_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Giving back 100 GiB of pinned memory takes a process that ran out of host memory longer than the wait."""
    monkeypatch.setattr(children, "ENDING_SECONDS", 0.5)
    code = "import os, sys, time; sys.stdin.readline(); os.dup2(2, 1); time.sleep(60)"
    stuck = Child([sys.executable, "-P", "-c", code], tmp_path / "log", dict(os.environ))
    stuck.go()
    with pytest.raises(MeasurementError, match="said no more, and had not ended after"):
        stuck.result(30, lambda line: None)


def _wait_for(holds: Any) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
