"""Measures what master weights are worth: the loss on held-out rows after a long run, with and without them.

    python -P -m held_out.masters --base DIR --train TRAIN.jsonl --held-out OTHER.jsonl --csv CSV

`DIR` is a Hugging Face folder, best of a real model (of the Gemma family, for its chat template). Each variant runs
once per seed, on the GPU, as a job would:

    masters   adapters compute in bfloat16 and are updated in fp32, as every job's are
    rounded   the same, but what an update leaves is rounded to bfloat16: no master weights
    fp32      everything in fp32, without our kernels: what the others are to be judged by
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows_file import append_rows
from finetune_kernels.primitives import multi_tensor_adamw
from held_out.job import Rows, finished, job

VARIANTS = ("masters", "rounded", "fp32")
COLUMNS = ("variant", "seed", "steps", "learning_rate", "held_out_loss", "step_ms", "peak_gib", "gpu", "torch")


def main() -> None:
    """Runs every variant with every seed, and prints a table of means and spreads."""
    options = _options()
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        for variant in options.variants:
            row = _measure(options, variant, seed)
            print(row, flush=True)
            append_rows(options.csv, COLUMNS, [row])
            found.setdefault(variant, []).append(row["held_out_loss"])

    for variant, losses in found.items():
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(f"{variant:<8} {statistics.mean(losses):.5f}  spread of the seeds {spread:.5f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    return parser.parse_args()


def _measure(options: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """Trains once; returns a row of the table."""
    training = {
        "maxSteps": options.steps,
        "learningRate": options.learning_rate,
        "loggingSteps": 100,
        "checkpointSteps": options.steps,
        "precision": "FP32" if variant == "fp32" else "BF16",
        "seed": seed,
    }
    config = job(options.base, "Gemma", Rows(options.train, options.held_out), training)
    original = multi_tensor_adamw._Vector.round
    if variant == "rounded":
        setattr(multi_tensor_adamw._Vector, "round", _rounding(original))  # noqa: B010

    torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    try:
        with finished(config) as run:
            loss = run.held_out_loss
    finally:
        setattr(multi_tensor_adamw._Vector, "round", original)  # noqa: B010

    return {
        "variant": variant,
        "seed": seed,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "held_out_loss": loss,
        "step_ms": round(1000 * (time.monotonic() - begun) / options.steps, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def _rounding(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """An end of the step that forgets what bfloat16 does not hold."""

    def round_masters(vector: Any) -> None:
        original(vector)
        vector.master.data.copy_(vector._rounded)

    return round_masters


if __name__ == "__main__":
    main()
