"""Decides what FP8 costs: held-out losses of BF16 and FP8, of the training and of the exported model.

    python -P -m held_out.fp8 --conversations ALL.jsonl --gemma DIR --work DIR --csv CSV --processes 9

`ALL.jsonl` has conversations of all lengths, such as those that `python -P -m finetune_test_models.chat_data ALL.jsonl`
writes; `DIR` of --gemma is the folder that `python -P -m finetune_test_models.real_model` prints. Two other models are
trained from random weights first, by plain PyTorch (bases.py); they stay below --work and are used again.

Several runs share the GPU, so their times say nothing. Rows that the CSV file has already are not measured again. On a
CPU, the harness itself is tried with `--models tiny-llama tiny-qwen3 --variants bf16 fp32`.
"""

import argparse
import csv
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.rows_file import append_rows
from held_out.bases import CONFIGS, Reading, make_base
from held_out.cell import VARIANTS, Base, Cell, measure
from held_out.conversations import HELD_OUT, Split, split
from held_out.verdict import compare, table, verdict

T = TypeVar("T")
GEMMA = "gemma-3-270m"
MODELS = (GEMMA, "llama", "qwen3")
KEY = ("model", "variant", "seed", "steps", "learning_rate")
COLUMNS = (
    *KEY, "base_loss", "training_loss", "exported_loss", "precision", "precision_reason", "seconds", "gpu", "torch",
)  # fmt: skip


def main() -> None:
    """Makes the bases, runs all cells, and prints the comparison and the verdict."""
    options, begun = _options(), time.monotonic()
    conversations = split(options.conversations, train=options.train_rows, held_out=options.held_out_rows)
    options.work.mkdir(parents=True, exist_ok=True)

    with ThreadPoolExecutor(options.processes) as pool:
        bases = _bases(options, conversations, pool)
        print(f"bases after {time.monotonic() - begun:.0f} s", flush=True)
        rows = conversations.write_rows(options.work)
        cells = [
            Cell(base, rows, variant, seed, options.steps, options.learning_rate)
            for seed in options.seeds
            for base in bases
            for variant in options.variants
        ]
        failures = _measure(options, cells, pool)

    _report(options)
    print(f"{time.monotonic() - begun:.0f} s in all")
    if failures:
        sys.exit(f"{failures} runs failed")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--gemma", type=Path, help=f"folder of {GEMMA}")

    parser.add_argument("--models", nargs="+", choices=(GEMMA, *CONFIGS), default=MODELS)
    parser.add_argument("--variants", nargs=2, choices=tuple(VARIANTS), default=("bf16", "fp8"))
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--processes", type=int, default=9, help="runs at once on the one GPU")
    parser.add_argument("--reading-steps", type=int, default=Reading.steps, help="steps from random weights")
    parser.add_argument("--reading-rows", type=int, default=Reading.rows)
    parser.add_argument("--train-rows", type=int, help="fewer rows, to try the harness")
    parser.add_argument("--held-out-rows", type=int, default=HELD_OUT)

    options = parser.parse_args()
    if GEMMA in options.models and options.gemma is None:
        parser.error(f"--gemma is required for {GEMMA}")
    return options


def _in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """Calls `function` in a process of its own: a new CUDA context, and an end that costs no other run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as single:
        return single.submit(function, *arguments).result()


def _bases(options: argparse.Namespace, conversations: Split, pool: ThreadPoolExecutor) -> list[Base]:
    """Returns the bases in the order of --models; those that are not there yet are made, side by side."""
    reading = Reading(steps=options.reading_steps, rows=options.reading_rows)
    made, bases = {}, []
    for name in options.models:
        if name == GEMMA:
            bases.append(Base(name, options.gemma, "Gemma"))
            continue
        folder = options.work / name
        bases.append(Base(name, folder, "ChatML"))
        if not (folder / "tokenizer_config.json").exists():  # the last file that is written
            made[name] = pool.submit(_in_own_process, make_base, name, conversations.reading, folder, reading)

    for name, future in made.items():
        print(f"{name}: loss {future.result():.3f} after {reading.steps} steps from random weights", flush=True)
    return bases


def _measure(options: argparse.Namespace, cells: Sequence[Cell], pool: ThreadPoolExecutor) -> int:
    """Runs the cells that the CSV file lacks, and adds a row for each as it ends; returns the number of failures."""
    done = {_key(row) for row in _read(options.csv)}
    futures = {
        pool.submit(_in_own_process, measure, cell): cell
        for cell in cells
        if _key(vars(cell) | {"model": cell.base.name}) not in done
    }

    failures = 0
    for future in as_completed(futures):
        cell = futures[future]
        if (error := future.exception()) is not None:
            failures += 1
            print(f"{cell.base.name} {cell.variant} {cell.seed} failed: {error!r}", flush=True)
            continue
        print(row := future.result(), flush=True)
        append_rows(options.csv, COLUMNS, [row])
    return failures


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def _report(options: argparse.Namespace) -> None:
    """Prints both comparisons of the runs of these lengths; the exported model decides."""
    wanted = (str(options.steps), str(options.learning_rate))
    rows = [
        row
        for row in _read(options.csv)
        if (row["steps"], row["learning_rate"]) == wanted
        and row["model"] in options.models
        and int(row["seed"]) in options.seeds
    ]

    variants = tuple(options.variants)
    for loss in ("training_loss", "exported_loss"):
        print(f"\n{loss}, nats a supervised token")
        print(table(compare(rows, variants, loss), variants))
    print(f"\nexported: {verdict(compare(rows, variants, 'exported_loss'), len(options.models))}")


if __name__ == "__main__":
    main()
