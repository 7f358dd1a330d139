"""Measures training on several GPUs: one GPU, all of a machine with the base on each or shared out, a base that no card
holds, and a checkpoint of all that fewer go on from.

    PYTHONPATH=crds:kernels:trainer_image:trainer_image/benchmarks \\
        python -P trainer_image/benchmarks/several_gpus.py --gpus 4 --card-gib 24 --seconds 540 --csv OUT.csv

Models have random weights, made in NF4 on each rank. Each row is printed and appended as soon as it is there. A row
that fails or takes too long is left out: the processes are started again for those that are left, while there is time.
"""

import argparse
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.provenance import current_commit, installed_versions
from benchmarks.rows_file import append_rows
from finetune_api.gpus import GPU_ALLOCATOR
from speed.rows import SHAPES, working_folder
from speed.several.cases import Case, Machine, cases, launches

COLUMNS = (
    "row", "model", "gpus", "parallelism", "card_gib", "tokens_per_step", "tokens_per_second", "per_gpu", "step_ms",
    "spread", "peak_gib", "planned_gib", "base_gib", "memory_mode", "fallbacks", "micro_batch", "last_loss",
    "curve_difference", "all_reduce_ms", "waiting_ms", "gathers_ms", "exposed_gathers_ms", "ready_s", "all_s", "gpu",
    "versions", "commit",
)  # fmt: skip
START_SECONDS = 90.0
"""Time that a launch may take before its first row begins, on a machine that has imported nothing yet."""
CLOSE_SECONDS = 10.0


@dataclass
class Campaign:
    """One call of the benchmark."""

    options: argparse.Namespace
    deadline: float
    losses: dict[str, list[float]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def conduct(self, chosen: Sequence[Case]) -> None:
        """Measures all rows, launch by launch."""
        for processes, wanted in launches(chosen, self.options.gpus):
            left = list(wanted)
            while left and self.left() > 0:
                left = self._launch(processes, left)
            self.failed += [case.name for case in left]

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()

    def _launch(self, processes: int, wanted: list[Case]) -> list[Case]:
        """Starts the processes for these rows; returns the rows after the first that failed, or none."""
        running = [_start(rank, processes, port, wanted, self.options) for port in (_free_port(),)
                   for rank in range(processes)]  # fmt: skip
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(running[0].stdout, lines), daemon=True).start()
        left, limit = list(wanted), START_SECONDS + self.options.row_seconds

        try:
            while left:
                line = self._next(lines, running, min(limit, self.left()))
                if line is None:
                    break
                if line.startswith("ROW "):
                    self._report(left.pop(0), json.loads(line.removeprefix("ROW ")))
                    limit = self.options.row_seconds + CLOSE_SECONDS
        finally:
            _end(running, patience=0 if left else CLOSE_SECONDS)

        if left:
            self.failed.append(left[0].name)
            logs = [_log(wanted, rank) for rank in range(processes)]
            print(f"{left[0].name} failed: see {logs[0]}\n{_last_lines(logs)}", flush=True)
        return left[1:]

    def _next(
        self, lines: "queue.SimpleQueue[str | None]", running: Sequence[subprocess.Popen[str]], seconds: float
    ) -> str | None:
        """The next line of rank 0; None if a process fails, or after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                return lines.get(timeout=0.2)
            except queue.Empty:
                if any(process.poll() for process in running):
                    return None
        return None

    def _report(self, case: Case, found: dict[str, Any]) -> None:
        """Prints a row, with its curve beside its reference's, and appends it to the file."""
        losses = self.losses[case.name] = found.pop("losses")
        reference = self.losses.get(case.reference or "")
        found["last_loss"] = round(losses[-1], 4)
        if reference is not None:
            pairs = zip(losses, reference, strict=False)
            found["curve_difference"] = f"{max(abs(one - other) / other for one, other in pairs):.1e}"

        row = {name: found.get(name) for name in COLUMNS}
        row |= {"versions": installed_versions(), "commit": self.options.commit or current_commit()}
        print("ROW", json.dumps({name: value for name, value in row.items() if value is not None}), flush=True)
        append_rows(self.options.csv, COLUMNS, [row])


def _start(
    rank: int, processes: int, port: int, wanted: Sequence[Case], options: argparse.Namespace
) -> "subprocess.Popen[str]":
    """Starts one process, in a session of its own."""
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1",
    } | GPU_ALLOCATOR  # fmt: skip
    command = [
        sys.executable, "-P", "-m", "speed.several.rank", *(case.name for case in wanted),
        f"--machine={json.dumps(asdict(_machine(options)))}", f"--seconds={options.row_seconds}",
    ]  # fmt: skip

    log = _log(wanted, rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as messages:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if rank == 0 else messages,
            stderr=messages, text=True, start_new_session=True,
        )  # fmt: skip


def _log(wanted: Sequence[Case], rank: int) -> Path:
    """The log of one process of a launch, which is named after the first row."""
    return working_folder() / "several" / f"{wanted[0].name}-rank-{rank}.log"


def _read(lines: TextIO, into: "queue.SimpleQueue[str | None]") -> None:
    for line in lines:
        into.put(line.rstrip("\n"))
    into.put(None)


def _end(running: Sequence["subprocess.Popen[str]"], patience: float) -> None:
    """Waits for the processes' own end for so many seconds, and kills those that are left with all they started."""
    end = time.monotonic() + patience
    for process in running:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_lines(logs: Sequence[Path]) -> str:
    """The ends of the logs, of rank 0 more than of the others."""
    found = []
    for rank, log in enumerate(logs):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        found += [f"  rank {rank}: {line[:220]}" for line in lines[-(8 if rank else 25) :]]
    return "\n".join(found)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def parse_arguments(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[Case]]:
    """Returns the parsed command line, and the rows that it chooses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--rows", help="names, with commas between; default: all")
    parser.add_argument("--model", default="llama-8b", choices=SHAPES, help="model of most rows")
    parser.add_argument("--large", default="llama-70b", choices=SHAPES, help="model that no card holds")
    parser.add_argument(
        "--card-gib", type=float, default=24.0, help="limit of each card in the rows of the large model"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--seconds", type=float, default=540.0, help="time for everything")
    parser.add_argument("--row-seconds", type=float, default=150.0, help="time limit of a row")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"), help="file to append to")
    parser.add_argument("--commit", help="commit that is measured (default: git's)")
    options = parser.parse_args(words)

    known = cases(_machine(options))
    names = options.rows.split(",") if options.rows else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--rows: unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
    return options, [known[name] for name in names]


def _machine(options: argparse.Namespace) -> Machine:
    return Machine(options.gpus, options.model, options.large, options.card_gib, options.length)


def main() -> int:
    """Runs the benchmark; returns 0 if no row failed."""
    began = time.monotonic()
    options, chosen = parse_arguments()
    campaign = Campaign(options, began + options.seconds)
    campaign.conduct(chosen)
    print(f"{time.monotonic() - began:.0f} s; failed or left out: {', '.join(campaign.failed) or 'none'}", flush=True)
    return 1 if campaign.failed else 0


if __name__ == "__main__":
    sys.exit(main())
