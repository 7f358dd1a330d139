"""Rates of quantising on CPUs, ours and llama.cpp's in turn: the same weights on the same cores. Not a part of CI.

    python trainer_image/benchmarks/quantise_rate.py --csv trainer_image/benchmarks/quantise_rate.csv

`encoder` is one tensor in memory: our `quantize` and `ggml_quantize_chunk`, on as many threads. `file` is a whole model
of fp32 weights in memory's file system: our export and `llama_model_quantize`, which llama-quantize calls. Rates are
MB/s of fp32 weights, the best of several rounds.
"""

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from finetune_api.vocabulary import GgufType
from finetune_test_models.tiny_model import make_tiny_model
from finetune_test_programs.reference_quantizer import quantize_files, quantize_rows
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.export.quantization.file_types import find_file_type
from finetune_trainer.export.quantization.quantize import quantize

MEGABYTE = 1e6
ROWS, COLUMNS = 2048, 4096
FILE_TYPES = [kind.value for kind in GgufType if kind not in (GgufType.F32, GgufType.MXFP4_MOE)]
Row = tuple[str, str, float, float]


def main() -> None:
    """Print one line for each type, and write the lines as CSV with --csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()

    rows = [*measure_encoders(arguments.rounds), *measure_files(arguments.rounds)]
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("what", "type", "ours MB/s", "llama.cpp MB/s", "ratio", "threads"))
            threads = torch.get_num_threads()
            for what, kind, ours, theirs in rows:
                writer.writerow((what, kind, round(ours), round(theirs), round(ours / theirs, 2), threads))


def best(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of each action; they take turns, so that all meet the same disturbances, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - began)
    return {name: min(measured[1:]) for name, measured in seconds.items()}


def report(what: str, kind: str, size: int, seconds: dict[str, float]) -> Row:
    """Print a line and return it."""
    ours, theirs = (size / seconds[name] / MEGABYTE for name in ("ours", "theirs"))
    print(f"{what:8} {kind:7} ours {ours:7.0f}  llama.cpp {theirs:7.0f} MB/s  {ours / theirs:5.2f}", flush=True)
    return what, kind, ours, theirs


def measure_encoders(rounds: int) -> list[Row]:
    """Measure each tensor type on normal weights, as trained matrices mostly are."""
    weights = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02
    threads = torch.get_num_threads()
    rows = []
    for kind in sorted({find_file_type(name).matrices for name in FILE_TYPES}):

        def ours(kind: GGMLQuantizationType = kind) -> object:
            return quantize(weights, kind)

        def theirs(kind: GGMLQuantizationType = kind) -> object:
            return quantize_rows(weights.numpy(), kind, threads=threads)

        rows.append(report("encoder", kind.name, weights.nbytes, best({"ours": ours, "theirs": theirs}, rounds)))
    return rows


def measure_files(rounds: int) -> list[Row]:
    """Measure each file type on a Llama of about 120 million weights with matrices of the usual width."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112, S108  # disks are not what is measured
    with tempfile.TemporaryDirectory(prefix="quantise-rate-", dir=memory) as name:
        folder = Path(name)
        base = make_tiny_model(
            folder / "base", texts=["a text to learn from"] * 10, hidden_size=2048, vocab_size=8192,
            intermediate_size=5632, num_attention_heads=16, num_key_value_heads=4, dtype=torch.float32,
        )  # fmt: skip
        source = run_export(base, folder / "source", "F32")
        size = source.stat().st_size

        rows = []
        for kind in FILE_TYPES:
            seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(rounds + 1):
                began = time.perf_counter()
                run_export(base, folder / "ours", kind)
                seconds["ours"].append(time.perf_counter() - began)
                target = folder / "theirs.gguf"
                threads = torch.get_num_threads()
                seconds["theirs"].append(quantize_files(source, {kind: target}, threads=threads)[kind])
            rows.append(report("file", kind, size, {name: min(taken[1:]) for name, taken in seconds.items()}))
        return rows


def run_export(base: Path, output: Path, kind: str) -> Path:
    """Export one GGUF file of that type."""
    request = ExportRequest(base=base, adapter=None, output=output, merged=None, gguf=(kind,), name="model")
    (file,) = export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    return file.path


if __name__ == "__main__":
    main()
