"""Lines of micro.csv, one for each kernel and direction, and their table for docs/benchmarks.md."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from benchmarks.micro_case import Case

MICRO = Path(__file__).with_name("micro.csv")
SHOWN = (
    "rms_norm, residual", "rms_norm", "rotary_embedding", "rotary_embedding, head norm", "gated_activation",
    "adapted_activation", "linear_group qkv", "linear_group gate_up", "linear_group down", "linear_cross_entropy",
    "blocked_cross_entropy",
    "nf4 decoding", "attention, cuDNN, 2 documents", "attention, FlashAttention, 2 documents", "capped_attention",
    "flat_adamw",
)  # fmt: skip
"""Kernels in the table of docs/benchmarks.md, in this order."""


@dataclass(frozen=True)
class Timing:
    """One line of micro.csv, with a field for each column."""

    kernel: str
    direction: str
    """forward, backward, both (a kernel that makes its gradient at once) or step (an optimiser)."""
    shape: str
    microseconds: float
    """Median of many calls with a cold L2 cache."""
    work: float
    """Bytes where `unit` is TB/s, floating point operations where it is TFLOP/s."""
    achieved: float
    """Work per second, in `unit`."""
    unit: str
    ceiling: float
    """Rate of the same GPU in the same run: a copy for TB/s, a large product for TFLOP/s."""
    share: float
    """Achieved rate over the ceiling."""
    eager_microseconds: float | None
    """The same computation by PyTorch's own operations."""
    rival: str
    """Name of another library with the same computation."""
    rival_microseconds: float | None
    gpu: str
    versions: str
    commit: str


class Machine(NamedTuple):
    """The GPU and the software of one run, and the rates that the GPU reached in it."""

    ceilings: dict[str, float]
    """Rate by unit: TB/s of a copy, TFLOP/s of a large product."""
    gpu: str
    versions: str
    commit: str


class Milliseconds(NamedTuple):
    """Median times of one case; None for what was not timed."""

    ours: float
    eager: float | None = None
    rival: float | None = None


def judge(case: "Case", times: Milliseconds, machine: Machine) -> Timing:
    """Returns the line of a case: its times, and its rate as a share of the machine's."""
    achieved = case.work / times.ours / 1e9
    ceiling = machine.ceilings[case.unit]
    eager, rival = (None if value is None else round(1e3 * value, 1) for value in times[1:])

    return Timing(
        kernel=case.kernel,
        direction=case.direction,
        shape=case.shape,
        microseconds=round(1e3 * times.ours, 1),
        work=case.work,
        achieved=round(achieved, 3),
        unit=case.unit,
        ceiling=round(ceiling, 3),
        share=round(achieved / ceiling, 3),
        eager_microseconds=eager,
        rival=case.rival_name if rival is not None else "",
        rival_microseconds=rival,
        gpu=machine.gpu,
        versions=machine.versions,
        commit=machine.commit,
    )


def write(path: Path, timings: Iterable[Timing]) -> None:
    """Writes the CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Timing))
        writer.writerows(["" if value is None else value for value in astuple(timing)] for timing in timings)


def read(path: Path = MICRO) -> list[Timing]:
    """Returns the lines of the file; none if there is no file."""
    if not path.exists():
        return []
    kinds = {field.name: field.type for field in fields(Timing)}
    return [
        Timing(**{name: _value(text, kinds[name]) for name, text in line.items()})
        for line in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    ]


def _value(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    return float(text) if text else None


def section(timings: Sequence[Timing]) -> list[str]:
    """Returns the Markdown lines of the table of shown kernels; none without timings."""
    found = {(one.kernel, one.direction): one for one in timings}
    shown = [kernel for kernel in SHOWN if any(name == kernel for name, _ in found)]
    if not shown:
        return []

    first = timings[0]
    ceilings = {one.unit: one.ceiling for one in timings}
    said = " and ".join(f"{ceilings[unit]:,.{digits}f} {unit} ({what})" for unit, digits, what in (
        ("TB/s", 2, "a copy"), ("TFLOP/s", 0, "a large bf16 product")) if unit in ceilings)  # fmt: skip

    lines = [
        "Each kernel alone at the shapes of Llama 8B with 4,096 tokens (capped attention: of Gemma 2 9B), with a cold",
        f"L2 cache, on one {first.gpu}; share of what the same GPU gave in the same run: {said}.", "",
        "| kernel | forward | | backward | |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for kernel in shown:
        forward = next((found[kernel, way] for way in ("forward", "both", "step") if (kernel, way) in found), None)
        cells = [_cell(one) for one in (forward, found.get((kernel, "backward")))]
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return [*lines, "", f"`make bench-kernels`, commit {first.commit}; {first.versions}.", ""]


def _cell(timing: Timing | None) -> str:
    if timing is None:
        return " | "
    rate = f"{timing.achieved:,.{0 if timing.unit == 'TFLOP/s' else 2}f} {timing.unit}"
    return f"{timing.microseconds:,.0f} us | {rate}, {timing.share:.0%}"
