"""`several_gpus.csv`: a line for each row of a call; a call begins with the row of one GPU. Pure, except for `read`."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEVERAL = Path(__file__).parents[2] / "several_gpus.csv"
FIRST = "one"


@dataclass(frozen=True)
class Measured:
    """One row of a call."""

    row: str
    gpus: int
    card_gib: float | None
    tokens_per_second: float
    """Of all GPUs together."""
    peak_gib: float
    """Of the first card."""
    planned_gib: float | None
    step_ms: float | None
    all_reduce_ms: float | None
    waiting_ms: float | None
    """Time of a step in which the first rank waits for the slowest."""
    gathers_ms: float | None
    exposed_gathers_ms: float | None
    """The part of the gathers during which nothing is computed."""
    gpu: str
    commit: str


def read(path: Path = SEVERAL) -> list[list[Measured]]:
    """Returns the calls, oldest first; lines before the first call were written by an older form of the benchmark."""
    calls: list[list[Measured]] = []
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if line["row"] == FIRST:
                calls.append([])
            if calls:
                calls[-1].append(_measured(line))
    return calls


def newest_of(calls: Sequence[Sequence[Measured]], row: str, gpus: int) -> tuple[Measured, Measured] | None:
    """Returns the newest line of a row on so many GPUs, and one GPU's of the same call; None if there is none."""
    for call in reversed(calls):
        for line in call:
            if (line.row, line.gpus) == (row, gpus):
                return line, call[0]
    return None


def _measured(line: dict[str, str]) -> Measured:
    def number(name: str) -> float | None:
        return float(line[name]) if line[name] else None

    return Measured(
        line["row"], int(line["gpus"]), number("card_gib"),
        float(line["tokens_per_second"]), float(line["peak_gib"]), number("planned_gib"), number("step_ms"),
        number("all_reduce_ms"), number("waiting_ms"), number("gathers_ms"), number("exposed_gathers_ms"),
        line["gpu"], line["commit"],
    )  # fmt: skip
