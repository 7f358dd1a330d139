"""Measures whole runs on one and on several GPUs of a machine: speed, the curve, and how fast a run ends.

    python -P trainer_image/benchmarks/whole_runs.py CSV GPUS MODEL RUN [RUN ...]

Each run is a process as in a pod, from loading to the published adapter; models have random weights (`speed.models`).
`same`: one GPU and all, with the same steps; `fp8`: all, in FP8; `killed`: a rank is killed; `stopped`: a run
is stopped by SIGTERM and goes on with one GPU.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.rows_file import append_rows

COLUMNS = ("model", "run", "gpus", "step", "seconds", "tokens_per_second", "last_loss", "peak_gib", "told", "gpu")
STEPS, STOP_STEP, ROWS = 16, 5, 1500
ORDERS = {
    "same": lambda gpus: (1, gpus),
    "fp8": lambda gpus: (gpus,),
    "killed": lambda gpus: (gpus,),
    "stopped": lambda gpus: (gpus, 1),
}
"""By name: the numbers of GPUs that it is run with, one after the other."""

TEMPLATE = "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"


def main(table: Path, gpus: int, model: str, runs: list[str]) -> None:
    """Runs what is named, prints each row and appends it to the table."""
    base = _model(model)
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(Path(folder) / "rows.jsonl")
        for name, count in ((run, count) for run in runs for count in ORDERS[run](gpus)):
            # Attempts of one job share its results; each of the others is a job of its own.
            place = Path(folder) / (name if name == "stopped" else f"{name}-{count}")
            found = _process(base, rows, place, name, count, 4 * gpus)
            print(row := {"model": model, "run": name, "gpus": count} | found, flush=True)
            append_rows(table, COLUMNS, [row])


def _model(name: str) -> Path:
    """Returns the model's folder, with a chat template."""
    from speed.models import checkpoint
    from speed.rows import model_folder

    checkpoint.prepare(name)
    (model_folder(name) / "chat_template.jinja").write_text(TEMPLATE)
    return model_folder(name)


def _rows(path: Path) -> Path:
    """Writes conversations of random words, about 1,000 bytes each."""
    chance = random.Random(1)  # noqa: S311 (test data)
    words = ["".join(chance.choices("abcdefghijklmnopqrst", k=5)) for _ in range(500)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            said = [" ".join(chance.choices(words, k=80)) for _ in range(2)]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def _process(base: Path, rows: Path, place: Path, name: str, gpus: int, accumulation: int) -> dict[str, Any]:
    """Runs a job in a process of its own; returns what it told, and its duration."""
    place.mkdir(exist_ok=True)
    told = place / f"told-{gpus}.json"
    words = [str(base), str(rows), str(place), name, str(gpus), str(accumulation), str(told)]
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-P", __file__, "--run", *words], check=False)
    seconds = round(time.monotonic() - begun, 1)
    return (
        json.loads(told.read_text()) | {"seconds": seconds} if told.exists() else {"told": f"exit {ended.returncode}"}
    )


def run(*words: str) -> None:
    """Runs the job that `_process` describes here; writes what it told."""
    base, rows, place, name, gpus, accumulation, told = words
    from finetune_api.run_config import RunConfig
    from finetune_trainer.cli.pod import run_job
    from finetune_trainer.errors import TrainerError
    from finetune_trainer.job.logging_setup import configure_logging
    from finetune_trainer.job.progress_tracker import ProgressTracker
    from finetune_trainer.job.settings import Settings
    from finetune_trainer.job.stop_signal import StopSignal

    configure_logging()
    progress, stop_signal = ProgressTracker(), StopSignal()
    stop_signal.install()
    moment: list[float] = []

    def act() -> None:
        moment.append(time.monotonic())
        own = Path("/proc/self/task").glob("*/children")
        found = [int(pid) for file in own for pid in file.read_text().split()]
        ranks = [pid for pid in found if b"cli.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(ranks[0] if name == "killed" else os.getpid(), signal.SIGKILL if name == "killed" else signal.SIGTERM)

    def watch(_: bool) -> None:
        if name in ("killed", "stopped") and progress.value("step") == STOP_STEP and not moment:
            if gpus == "1" and progress.value("resumed_from_step"):
                return
            threading.Thread(target=act).start()

    def tell(what: str) -> None:
        values = {
            "step": progress.value("step"),
            "tokens_per_second": progress.value("tokens_per_second"),
            "last_loss": progress.value("loss"),
            "peak_gib": round((progress.value("gpu_memory_bytes") or 0) / 2**30, 2),
            "told": f"{what}; after the signal {time.monotonic() - moment[0]:.1f} s" if moment else what,
            "gpu": progress.resolved.device,
        }
        Path(told).write_text(json.dumps(values))

    def end(error: TrainerError) -> None:
        tell(f"ended by a thread: {error.reason}: {error.message}")
        os._exit(1)

    progress.listen(watch)
    folder = Path(place)
    settings = Settings(folder / f"work-{gpus}", f"on-{gpus}", output_folder=folder / "out")
    config = RunConfig.model_validate(
        _job(base, rows, int(gpus), int(accumulation), "FP8" if name == "fp8" else "Auto")
    )
    outcome = run_job(config, settings, progress, stop_signal, end)
    resumed = f", from step {outcome.resumed_from_step}" if outcome.resumed_from_step else ""
    share = progress.resolved.slowest_rank_share
    busiest = f", busiest rank {share:.1%}" if share else ""
    tell(f"{outcome.result}{resumed}{busiest} {outcome.reason or ''} {outcome.message}"[:300])
    os._exit(0)


def _job(base: str, rows: str, gpus: int, accumulation: int, precision: str) -> dict[str, Any]:
    training = {
        "precision": precision,
        "maxSteps": STEPS,
        "batchSize": 2,
        "gradientAccumulation": accumulation,
        "loggingSteps": 1,
        "checkpointSteps": 100,
    }
    return {
        "job": {"namespace": "default", "name": "whole", "uid": "uid-1"},
        "model": {"source": f"file://{base}", "maxSequenceLength": 2048},
        "dataset": {"source": f"file://{rows}"},
        "adapter": {"rank": 16},
        "training": training,
        "export": {"merged": "None", "gguf": []},
        "output": {"s3": {"bucket": "none"}},
        "outputPrefix": "default/whole",
        "checkpointsToKeep": 1,
        "terminationGracePeriodSeconds": 120,
        "gpus": gpus,
    }


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        run(*sys.argv[2:])
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
