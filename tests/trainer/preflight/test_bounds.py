"""Preflight's bounds on a small scale: memory of a process that meets an enormous row, and the rate of checking rows.
`trainer_image/benchmarks/preflight_rate.py` measures the real sizes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune_api.spec_inputs import DatasetSpec
from finetune_trainer.preflight.scan import scan_rows

LIMIT_BYTES = 500 * 2**20
ROW_BYTES = 50_000_000
RATE = 30e6  # bytes per second of one core; 90e6 were measured, on two busy cores
ROWS = 16_000


def row(question: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def peak_of_validate(manifest: Path, output: Path) -> int:
    """Most bytes that `finetune validate` had resident at once."""
    program = Path(sys.executable).with_name("finetune")
    process = subprocess.Popen(
        [program, "validate", str(manifest), "--output", str(output)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    peak = 0
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.02)
    said, _ = process.communicate()
    assert process.returncode == 0, said.decode()
    return peak


@pytest.mark.parametrize(
    ("ends_with", "is_below"), [("", True), ("\N{GRINNING FACE}", False)], ids=["ASCII", "control"]
)
def test_a_row_of_50_megabytes_stays_below_500_mebibytes(
    ends_with: str, is_below: bool, tiny_base: Path, tmp_path: Path
) -> None:
    # The control shows that the measure sees a row: one wide character makes Python hold four bytes for each.
    data = tmp_path / "rows.jsonl"
    data.write_text(row("why?") + row("word " * (ROW_BYTES // 5) + ends_with) + row("how?"))
    spec = {
        "model": {"source": f"file://{tiny_base}"},
        "dataset": {"source": f"file://{data}"},
        "output": {"s3": {"bucket": "unused"}},
    }
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "long"}, "spec": spec}
    manifest = tmp_path / "job.yaml"
    manifest.write_text(json.dumps(job))
    assert (peak_of_validate(manifest, tmp_path / "out") < LIMIT_BYTES) is is_below


def test_rows_are_checked_at_30_megabytes_a_second(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(row(f"{number} " + "some more words " * 120) for number in range(ROWS)))
    spec = DatasetSpec.model_validate({"source": f"file://{data}"})
    began = time.process_time()
    scan = scan_rows((data,), spec, None, 2048)
    seconds = time.process_time() - began
    assert (scan.rows, scan.bad) == (ROWS, 0)
    assert data.stat().st_size / seconds > RATE
