"""Times each kernel alone at the shapes of Llama 8B, on a machine with a GPU, in one to two minutes.

A rate is compared with what the same GPU reaches in the same minute: a copy in its memory for kernels that move bytes,
a large product for those that multiply. Times are medians with a cold L2 cache, written to micro.csv and printed.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from triton.errors import TritonError
from triton.testing import do_bench

from benchmarks.micro_results import MICRO, Machine, Milliseconds, Timing, judge, write
from benchmarks.provenance import current_commit, installed_versions

if TYPE_CHECKING:
    from benchmarks.micro_case import Case, Maker

WARM_UP_MS, TIMED_MS = 10, 50
MAX_SECONDS = 140
"""Time after which no further kernel is begun."""
ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, TritonError)
"""Errors of a rival of another version, whose time is left empty then, and of a kernel that this GPU refuses."""


@dataclass
class Session:
    """One run of the program: what was measured, and what was not."""

    console: Console
    output: Path
    machine: Machine
    deadline: float
    """time.monotonic() after which no case is begun."""
    timings: list[Timing] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def take(self, name: str, cases: Iterator["Case"], only: str) -> bool:
        """Times the cases of one maker; returns False if no time was left for all of them.

        An error of a maker ends the maker's own cases only.
        """
        while True:
            if time.monotonic() > self.deadline:
                return False

            try:
                case = next(cases, None)
            except ERRORS as error:
                self._say_failed(name, error)
                return True

            if case is None:
                return True
            if only in case.kernel:
                self._time(case)

    def _time(self, case: "Case") -> None:
        name = f"{case.kernel} {case.direction}"
        try:
            ms = median_ms(case.run)
        except ERRORS as error:
            self._say_failed(name, error)
            return

        eager, rival = self._try(case.eager, f"{name}, eager"), self._try(case.rival, f"{name}, {case.rival_name}")
        self.timings.append(judge(case, Milliseconds(ms, eager, rival), self.machine))
        write(self.output, self.timings)

    def _say_failed(self, name: str, error: Exception) -> None:
        self.failed.append(name)
        self.console.print(f"{name}: {type(error).__name__}: {str(error)[:600]}", style="red", markup=False)

    def _try(self, run: object, name: str) -> float | None:
        if run is None:
            return None
        try:
            return median_ms(run)
        except ERRORS as error:
            said = (str(error).splitlines() or [type(error).__name__])[0][:120]
            self.console.print(f"{name} was not timed: {said}", markup=False, highlight=False)
            return None


def main(words: Sequence[str] | None = None) -> int:
    """Times every kernel; returns 0 if all of ours ran."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=MICRO, help="CSV file to write")
    parser.add_argument("--only", default="", help="time only kernels whose name contains this word")
    parser.add_argument("--commit", default=None, help="commit that is measured (default: git's)")
    parser.add_argument(
        "--seconds", type=float, default=MAX_SECONDS, help="time after which no further kernel is begun"
    )
    arguments = parser.parse_args(words)

    began, console = time.monotonic(), Console(width=190)
    import torch

    from benchmarks.micro_case import Sizes

    torch.manual_seed(0)
    ceilings = measure_ceilings()
    said = ", ".join(f"{value:.2f} {unit}" for unit, value in ceilings.items())
    console.print(f"{torch.cuda.get_device_name()}: ceilings {said}", highlight=False)

    commit = arguments.commit or current_commit()
    machine = Machine(ceilings, torch.cuda.get_device_name(), installed_versions(), commit)
    session = Session(console, arguments.output, machine, began + arguments.seconds)
    # a maker's tensors are released before the next one's are made
    left_out = [name for name, make in makers().items() if not session.take(name, make(Sizes()), arguments.only)]

    console.print(table(session.timings))
    for what, names in (("failed", session.failed), ("no time was left for all of", left_out)):
        if names:
            console.print(f"{what}: {', '.join(names)}", markup=False, highlight=False)
    console.print(f"{time.monotonic() - began:.0f} s in all", highlight=False)
    return 1 if session.failed or left_out else 0


def makers() -> dict[str, "Maker"]:
    """Returns the makers of cases by subject; tensors of one subject are released before the next one's are made."""
    from benchmarks.micro_attention import attention_cases, optimizer_cases, softcap_cases
    from benchmarks.micro_bytes import byte_cases, decoding_cases
    from benchmarks.micro_cases import activation_cases, head_cases, norm_cases, rotation_cases
    from benchmarks.micro_linears import dropout_cases, linear_cases

    return {
        "norms": norm_cases, "rotation": rotation_cases, "activations": activation_cases, "linears": linear_cases,
        "dropout": dropout_cases, "head": head_cases, "decoding": decoding_cases, "bytes": byte_cases,
        "attention": attention_cases, "softcap": softcap_cases, "optimizer": optimizer_cases,
    }  # fmt: skip


def measure_ceilings() -> dict[str, float]:
    """Returns the rates of this GPU: TB/s of a copy of 1 GiB, TFLOP/s of the better of two large bf16 products."""
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
    """Returns the median time of a call in milliseconds; the L2 cache is cleared before each."""
    return float(do_bench(run, warmup=WARM_UP_MS, rep=TIMED_MS, return_mode="median"))


def table(timings: Iterable[Timing]) -> Table:
    """Returns the timings as a table for a terminal."""
    found = Table("kernel", "direction", "shape", "us", "rate", "of ceiling", "eager us", "rival us")
    for one in timings:
        eager = _beside("", one.eager_microseconds, one.microseconds)
        rival = _beside(f"{one.rival} ", one.rival_microseconds, one.microseconds)
        rate = f"{one.achieved:.{0 if one.unit == 'TFLOP/s' else 2}f} {one.unit}"
        found.add_row(
            one.kernel, one.direction, one.shape, f"{one.microseconds:.1f}", rate, f"{one.share:.0%}", eager, rival
        )
    return found


def _beside(name: str, other: float | None, ours: float) -> str:
    return "" if other is None else f"{name}{other:.1f} ({other / ours:.2f}x)"


if __name__ == "__main__":
    sys.exit(main())
