"""`micro.csv`: one line for each kernel and direction, timed alone; and its table in docs/benchmarks.md. Pure, except
for one reader and one writer."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

MICRO = Path(__file__).with_name("micro.csv")
SHOWN = (
    "rms_norm, residual", "rms_norm", "rotary_embedding", "rotary_embedding, head norm", "gated_activation",
    "adapted_activation", "linear_group qkv", "linear_group gate_up", "linear_group down", "linear_cross_entropy",
    "blocked_cross_entropy",
    "nf4 decoding", "attention, cuDNN, 2 documents", "attention, FlashAttention, 2 documents", "capped_attention",
    "flat_adamw",
)  # fmt: skip
"""Kernels in docs/benchmarks.md, in this order."""


@dataclass(frozen=True)
class Timing:
    """One line; a field for each column."""

    kernel: str
    direction: str
    """forward, backward, both (a kernel that makes its gradient at once) or step (an optimiser)."""
    shape: str
    microseconds: float
    """Median of many calls, the L2 cache cold."""
    work: float
    """Bytes where `unit` is TB/s, floating point operations where it is TFLOP/s."""
    achieved: float
    """In `unit`."""
    unit: str
    ceiling: float
    """Measured in the same run: copy for TB/s, large product for TFLOP/s."""
    share: float
    """Achieved over the ceiling."""
    eager_microseconds: float | None
    """The same computation by PyTorch's own operations."""
    rival: str
    rival_microseconds: float | None
    gpu: str
    versions: str
    commit: str


def judge(
    kernel: str, direction: str, shape: str, work: float, unit: str, ms: float, ceilings: dict[str, float],
    beside: Sequence[float | None], rival: str, origin: tuple[str, str, str],
) -> Timing:  # fmt: skip
    """The line of a call that took `ms`; `beside`: milliseconds of eager PyTorch and of the rival."""
    achieved = work / ms / 1e9
    eager, rival_us = (None if value is None else round(1e3 * value, 1) for value in beside)
    return Timing(
        kernel, direction, shape, round(1e3 * ms, 1), work, round(achieved, 3), unit, round(ceilings[unit], 3),
        round(achieved / ceilings[unit], 3), eager, rival if rival_us is not None else "", rival_us, *origin,
    )  # fmt: skip


def write(path: Path, timings: Iterable[Timing]) -> None:
    """The CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Timing))
        writer.writerows(["" if value is None else value for value in astuple(timing)] for timing in timings)


def read(path: Path = MICRO) -> list[Timing]:
    """The lines of the file; none where there is no file."""
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
    """Lines of docs/benchmarks.md: what the shown kernels reach; none without timings."""
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
