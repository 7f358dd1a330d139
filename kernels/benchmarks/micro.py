"""Each kernel alone at the shapes of Llama 8B: `micro.py`, on a machine with a GPU; about half a minute.

A rate is judged by what the same GPU gives in the same minute: a copy in its memory for kernels that move bytes, a
large product for those that multiply. Times are medians with a cold L2 cache. Written to micro.csv, shown as a table.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from triton.errors import TritonError
from triton.testing import do_bench

from benchmarks.run import current_commit, installed_versions

MICRO = Path(__file__).with_name("micro.csv")
WARM_UP_MS, TIMED_MS = 10, 60
ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, TritonError)
"""What a rival of another version may raise: its time is left empty then."""


@dataclass(frozen=True)
class Timing:
    """One kernel's line in micro.csv."""

    kernel: str
    shape: str
    ms: float
    achieved: float
    """In `unit`."""
    unit: str
    ceiling: float
    """Measured in the same run: copy for TB/s, large product for TFLOP/s."""
    share: float
    eager_ms: float | None
    rival: str
    rival_ms: float | None
    gpu: str
    versions: str
    commit: str


def main(words: Sequence[str] | None = None) -> int:
    """Time every kernel; 0 where all of ours ran."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=MICRO, help="CSV file to write")
    parser.add_argument("--only", default="", help="kernels whose name holds this word")
    parser.add_argument("--commit", default=None, help="what is measured, where git cannot tell")
    arguments = parser.parse_args(words)
    began, console = time.monotonic(), Console(width=170)
    import torch

    from benchmarks.micro_cases import Sizes, all_cases

    torch.manual_seed(0)
    ceilings = measure_ceilings()
    said = ", ".join(f"{value:.2f} {unit}" for unit, value in ceilings.items())
    console.print(f"{torch.cuda.get_device_name()}: ceilings {said}", highlight=False)
    timings, failed = [], []
    origin = (torch.cuda.get_device_name(), installed_versions(), arguments.commit or current_commit())
    for case in all_cases(Sizes()):
        if arguments.only not in case.kernel:
            continue
        try:
            ms = median_ms(case.run)
        except ERRORS as error:
            failed.append(case.kernel)
            console.print(f"{case.kernel}: {error}", style="red", markup=False)
            continue
        beside = [_try(run, f"{case.kernel}, {name}", console) for name, run in (
            ("eager", case.eager), (case.rival_name, case.rival))]  # fmt: skip
        timings.append(
            judge(case.kernel, case.shape, case.work, case.unit, ms, ceilings, beside, case.rival_name, origin)
        )
        write(arguments.output, timings)
    console.print(table(timings))
    console.print(f"{time.monotonic() - began:.0f} s in all" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def judge(
    kernel: str, shape: str, work: float, unit: str, ms: float, ceilings: dict[str, float],
    beside: Sequence[float | None], rival: str, origin: tuple[str, str, str],
) -> Timing:  # fmt: skip
    """Rate and share of the ceiling: `work` bytes or operations in `ms`. Pure."""
    achieved = work / ms / 1e9
    eager, rival_ms = (None if value is None else round(value, 4) for value in beside)
    return Timing(
        kernel, shape, round(ms, 4), round(achieved, 3), unit, round(ceilings[unit], 3),
        round(achieved / ceilings[unit], 3), eager, rival if rival_ms is not None else "", rival_ms, *origin,
    )  # fmt: skip


def measure_ceilings() -> dict[str, float]:
    """What this GPU gives: TB/s of a copy of 1 GiB, and TFLOP/s of the better of two large bf16 products."""
    import torch

    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda").normal_()
    copied = 2 * source.nbytes / median_ms(partial(torch.empty_like(source).copy_, source)) / 1e9
    rates = []
    for m, k, n in ((4096, 4096, 28672), (8192, 8192, 8192)):
        a = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        b = torch.randn(k, n, dtype=torch.bfloat16, device="cuda")
        rates.append(2.0 * m * k * n / median_ms(partial(torch.mm, a, b)) / 1e9)
    return {"TB/s": copied, "TFLOP/s": max(rates)}


def median_ms(run: object) -> float:
    """Median time of a call, the L2 cache cleared before each."""
    return float(do_bench(run, warmup=WARM_UP_MS, rep=TIMED_MS, return_mode="median"))


def _try(run: object, name: str, console: Console) -> float | None:
    if run is None:
        return None
    try:
        return median_ms(run)
    except ERRORS as error:
        console.print(f"{name} was not timed: {str(error).splitlines()[0][:120]}", markup=False, highlight=False)
        return None


def write(path: Path, timings: Iterable[Timing]) -> None:
    """The CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Timing))
        writer.writerows(["" if value is None else value for value in astuple(timing)] for timing in timings)


def table(timings: Iterable[Timing]) -> Table:
    """For people."""
    found = Table("kernel", "shape", "ms", "rate", "of ceiling", "eager", "rival")
    for one in timings:
        eager = "" if one.eager_ms is None else f"{one.eager_ms:.3f} ({one.eager_ms / one.ms:.2f}x)"
        rival = "" if one.rival_ms is None else f"{one.rival} {one.rival_ms:.3f} ({one.rival_ms / one.ms:.2f}x)"
        rate = f"{one.achieved:.{0 if one.unit == 'TFLOP/s' else 2}f} {one.unit}"
        found.add_row(one.kernel, one.shape, f"{one.ms:.3f}", rate, f"{one.share:.0%}", eager, rival)
    return found


if __name__ == "__main__":
    sys.exit(main())
