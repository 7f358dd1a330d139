"""One system, one row, one process: `measure.py ours 8b-2048-bs2-ga4`.

A step's time is taken with the GPU idle at both ends. Prints `TRAINING` when the first step is about to begin and
`RESULT` with a JSON object at the end: tokens per second (median of the steps after warm-up), their spread, peak
memory, first step, gradient norm. With `--wait` the libraries are imported, and then a line on stdin is waited for.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.rows import ROWS, STEPS, SYSTEMS, WARM_UP, Row, model_folder
from benchmarks.systems import build, import_libraries


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps")
    parser.add_argument("--wait", action="store_true", help="import, then wait for a line on stdin")
    parser.add_argument("--seconds", type=float, default=600.0, help="for the search of the longest sequence")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="profile two more steps; tables as CSV there")
    arguments = parser.parse_args()
    import_libraries(arguments.system)
    if arguments.wait:
        sys.stdin.readline()
    row, folder = ROWS[arguments.row], model_folder(ROWS[arguments.row].model)
    if row.card_gib is None:
        found = measure(arguments.system, row, folder, arguments.steps, arguments.profile)
    else:
        from benchmarks.longest import search

        found = search(arguments.system, row, folder, arguments.seconds, _say)
    import torch

    found = {"row": arguments.row, "system": arguments.system, "gpu": torch.cuda.get_device_name()} | found
    _say("RESULT " + json.dumps(found))


def measure(system: str, row: Row, folder: Path, steps: int, profile: Path | None) -> dict[str, Any]:
    """Train, and time each step."""
    import torch

    trainer = build(system, row, folder, WARM_UP + steps + (0 if profile is None else 2))
    watch = make_watch()
    trainer.add_callback(watch)
    if profile is not None:
        from benchmarks.step_profile import make_profiler

        profiler = make_profiler(first=WARM_UP + steps)
        trainer.add_callback(profiler)
    torch.cuda.reset_peak_memory_stats()
    _say("TRAINING")
    trainer.train()
    found = summarise(watch.ends, trainer.state.log_history, row, WARM_UP, steps)
    found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    planned = getattr(trainer, "planned", None)
    found["planned_gib"] = round(planned / 2**30, 2) if planned else None
    if profile is not None:
        launching = statistics.median(watch.launched[WARM_UP : WARM_UP + steps])
        profiler.write(profile, f"{system}-{row.model}-{row.length}", launching)
    return found


def make_watch() -> Any:
    """A callback that keeps the times of the steps' ends (`ends`, the first step's beginning before them) and the
    seconds until each step was launched (`launched`)."""
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.launched: list[float] = []

        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            if not self.ends:
                torch.cuda.synchronize()
                self.ends.append(time.perf_counter())

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            self.launched.append(time.perf_counter() - self.ends[-1])
            torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    return Watch()


def summarise(ends: list[float], history: list[dict[str, float]], row: Row, warm_up: int, steps: int) -> dict[str, Any]:
    """The figures of a run from its steps' ends and its log: `warm_up` steps that do not count, then `steps` that do.
    Raises RuntimeError where nothing was learned: such a run measures nothing."""
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if len(norms) < warm_up + steps or not min(norms) > 0:
        raise RuntimeError(f"nothing was learned: gradient norms {norms}")
    times = [last - first for first, last in pairwise(ends)]
    rates = [row.tokens / seconds for seconds in times[warm_up : warm_up + steps]]
    return {
        "tokens_per_second": round(statistics.median(rates), 1),
        "spread": round((max(rates) - min(rates)) / statistics.median(rates), 4),
        "first_step_s": round(times[0], 2), "grad_norm": round(statistics.median(norms), 4),
        "loss": round(losses[-1], 4),
    }  # fmt: skip


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
