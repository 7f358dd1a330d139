"""Memory and processor time of an idle operator, and how soon a job gets its pod."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster

IDLE_MIB = 150


def test_an_idle_operator_stays_below_its_memory_budget(operator: OperatorProcess) -> None:
    status = Path(f"/proc/{operator.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    print(f"operator: {int(found[1]) / 1024:.0f} MiB resident")
    assert int(found[1]) / 1024 < IDLE_MIB


def test_an_idle_operator_uses_next_to_no_processor_time(operator: OperatorProcess) -> None:
    before = _processor_ticks(operator.pid)
    time.sleep(3)
    assert _processor_ticks(operator.pid) - before <= 30  # of 300: a tenth of one core


def _processor_ticks(pid: int) -> int:
    """User and system time of a process, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_a_job_gets_its_pod_within_two_seconds(operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet) -> None:
    began = time.monotonic()
    jobs.create("quick")
    kubelet.wait_for_pod("quick")
    seconds = time.monotonic() - began
    print(f"apply to pod: {seconds:.2f} s")
    assert seconds < 2
