"""Preflight's bounds on a small scale: memory of a process that meets an enormous row, and the rate of checking rows.
`trainer_image/benchmarks/preflight_rate.py` measures the real sizes."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from finetune_api.spec.inputs import DatasetSpec
from finetune_test_models.ranks.processes import children_of
from finetune_trainer.preflight.scan import scan_rows

LIMIT_BYTES = 500 * 2**20
ROW_BYTES = 50_000_000
ROWS = 16_000
# Of the time that Python's own parser takes for the same lines: 5.6 to 9.0 were measured, on idle and on busy cores.
MOST_PARSERS = 15


EMOJI = "\N{GRINNING FACE}"
LONG_TEXT = "word " * (ROW_BYTES // 5)


def row(*questions: str) -> dict[str, Any]:
    messages = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in questions]
    return {"messages": list(chain.from_iterable(messages))}


def line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def write_lines(path: Path, long: dict[str, Any]) -> Path:
    path.write_text(line(row("why?")) + line(long) + line(row("how?")))
    return path


def write_list(path: Path, long: dict[str, Any]) -> Path:
    path.write_text(json.dumps([row("why?"), long, row("how?")], ensure_ascii=False))
    return path


def write_parquet(path: Path, long: dict[str, Any]) -> Path:
    parquet.write_table(arrow.Table.from_pylist([row("why?"), long, row("how?")]), path)
    return path


def write_csv(path: Path, *texts: str) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], *([text, "yes"] for text in texts)])
    return path


LONG_ROWS: dict[str, Callable[[Path], Path]] = {
    "ASCII": lambda folder: write_lines(folder / "rows.jsonl", row(LONG_TEXT)),
    "one emoji": lambda folder: write_lines(folder / "rows.jsonl", row(LONG_TEXT + EMOJI)),
    "every third an emoji": lambda folder: write_lines(folder / "rows.jsonl", row((EMOJI + "ab") * (ROW_BYTES // 6))),
    "in several turns": lambda folder: write_lines(folder / "rows.jsonl", row("a", LONG_TEXT + EMOJI, "b")),
    "a list": lambda folder: write_list(folder / "rows.json", row(LONG_TEXT + EMOJI)),
    "CSV": lambda folder: write_csv(folder / "rows.csv", "why?", LONG_TEXT + EMOJI, "how?"),
    "Parquet": lambda folder: write_parquet(folder / "rows.parquet", row(LONG_TEXT + EMOJI)),
}


def peak_of(command: list[str | Path]) -> int:
    """Most bytes that a process and its children held at once (shared pages once), by the kernel's count."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        peak = 0
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            peak = max(peak, sum(map(held_by, [process.pid, *children_of(process.pid)])))
            time.sleep(0.01)
        said, _ = process.communicate()
    assert process.returncode == 0, said.decode()
    return peak


def held_by(process: int) -> int:
    with suppress(OSError):  # it has ended
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return 0


@pytest.mark.parametrize("write", LONG_ROWS.values(), ids=LONG_ROWS)
def test_a_row_of_50_megabytes_stays_below_500_mebibytes(
    write: Callable[[Path], Path], tiny_base: Path, tmp_path: Path
) -> None:
    spec = {
        "model": {"source": f"file://{tiny_base}"},
        "dataset": {"source": f"file://{write(tmp_path)}"},
        "output": {"s3": {"bucket": "unused"}},
    }
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "long"}, "spec": spec}
    manifest = tmp_path / "job.yaml"
    manifest.write_text(json.dumps(job))
    program = Path(sys.executable).with_name("finetune")
    # A tokenizer of 128,000 tokens takes 60 MiB more than the tiny one here.
    assert peak_of([program, "validate", manifest, "--output", tmp_path / "out"]) < LIMIT_BYTES - 60 * 2**20
    report = json.loads((tmp_path / "out/long/preflight/report.json").read_text())
    assert (report["rows"]["total"], report["rows"]["bad"], report["rows"]["oversized"]) == (3, 0, 1)


@pytest.mark.parametrize(
    ("max_characters", "is_below"), [(1_000_000, True), (None, False)], ids=["truncated", "control"]
)
def test_reading_a_row_of_50_megabytes_with_an_emoji_takes_less_than_the_row_in_python(
    max_characters: int | None, is_below: bool, tmp_path: Path
) -> None:
    """The control reads as training does: Python holds four bytes a character, so the bound is one that can fail."""
    path = write_lines(tmp_path / "rows.jsonl", row(LONG_TEXT + EMOJI))
    code = (
        "import sys; from pathlib import Path; from finetune_trainer.data.rows import read_rows\n"
        f"assert len([row.location for row in read_rows((Path(sys.argv[1]),), max_characters={max_characters})]) == 3"
    )
    assert (peak_of([sys.executable, "-c", code, path]) < 4 * ROW_BYTES) is is_below


def parse_lines(path: Path) -> None:
    with path.open(encoding="utf-8") as file:
        for text in file:
            json.loads(text)


def cpu_seconds(action: Callable[[], object]) -> float:
    """The least of three times: of one alone, a busy machine may take three times as long."""
    times = []
    for _ in range(3):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    return min(times)


def test_rows_are_checked_in_the_time_of_a_few_parsers(tmp_path: Path) -> None:
    """A bound in bytes a second would judge the machine: one core checked 30 to 90 megabytes a second."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(line(row(f"{number} " + "some more words " * 120)) for number in range(ROWS)))
    spec = DatasetSpec.model_validate({"source": f"file://{data}"})
    scan = scan_rows((data,), spec, None, 2048)
    assert (scan.rows, scan.bad) == (ROWS, 0)

    assert cpu_seconds(lambda: scan_rows((data,), spec, None, 2048)) < MOST_PARSERS * cpu_seconds(
        lambda: parse_lines(data)
    )
