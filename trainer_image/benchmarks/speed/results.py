"""`results.csv`: one line for each measurement; lines with the same `run` were measured side by side. Pure, except for
`read` and `append`."""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.csv")
PEERS = ("unsloth-max", "unsloth")
COMPLETE = {"ours", "unsloth-max"}
"""Systems that a run must hold for a row to be shown."""


@dataclass(frozen=True)
class Result:
    """One measurement; a field for each column."""

    run: int
    row: str
    """Model, length, batch and accumulation, such as 8b-2048-bs2-ga4."""
    system: str
    tokens_per_second: float
    """Median of the timed steps."""
    spread: float
    """(fastest - slowest step) / median."""
    peak_gib: float
    planned_gib: float | None
    """Prediction of the memory plan (this project only)."""
    max_tokens: int | None
    """Longest sequence that trained, if the row searches for it."""
    first_step_s: float
    grad_norm: float
    gpu: str
    versions: str
    commit: str
    host_gib: float | None = None
    """Peak of the process's host memory, where the row reports it."""


COLUMNS = tuple(field.name for field in fields(Result))


def parse(text: str) -> list[Result]:
    """Returns the results in a CSV file; columns that an old file lacks are None."""
    return [
        Result(
            run=int(line["run"]), row=line["row"], system=line["system"],
            tokens_per_second=float(line["tokens_per_second"]), spread=float(line["spread"]),
            peak_gib=float(line["peak_gib"]),
            planned_gib=float(line["planned_gib"]) if line.get("planned_gib") else None,
            max_tokens=int(line["max_tokens"]) if line.get("max_tokens") else None,
            first_step_s=float(line["first_step_s"]), grad_norm=float(line["grad_norm"]), gpu=line["gpu"],
            versions=line["versions"], commit=line["commit"],
            host_gib=float(line["host_gib"]) if line.get("host_gib") else None,
        )
        for line in csv.DictReader(io.StringIO(text))
    ]  # fmt: skip


def write(results: Iterable[Result]) -> str:
    """Returns the text of the CSV file."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in results:
        values: list[Any] = [getattr(result, column) for column in COLUMNS]
        writer.writerow("" if value is None else value for value in values)
    return out.getvalue()


def read(path: Path = RESULTS) -> list[Result]:
    """Returns the results so far; an empty list if there is no file."""
    return parse(path.read_text(encoding="utf-8")) if path.exists() else []


def append(path: Path, result: Result) -> None:
    """Adds one line; the file is complete at any time."""
    text = write([*read(path), result])
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def next_run(results: Iterable[Result]) -> int:
    """Returns the largest run number plus one."""
    return max((result.run for result in results), default=0) + 1


def newest(results: Sequence[Result], needed: set[str]) -> dict[str, list[Result]]:
    """Returns, for each row, the results of the newest run that holds all `needed` systems. Rows are in file order."""
    found: dict[str, list[Result]] = {}
    for row in dict.fromkeys(result.row for result in results):
        of_row = [result for result in results if result.row == row]
        runs = sorted({result.run for result in of_row}, reverse=True)

        for run in runs:
            of_run = [result for result in of_row if result.run == run]
            if needed <= {result.system for result in of_run}:
                found[row] = of_run
                break
    return found


@dataclass(frozen=True)
class Summary:
    """Repeated measurements of one system, in one run of one row."""

    system: str
    tokens_per_second: float
    """Median of the repeats."""
    spread: float
    """Between repeats if there are several, else within the single measurement."""
    peak_gib: float
    planned_gib: float | None
    max_tokens: int | None
    first_step_s: float
    """Shortest of the repeats: after the first, the Triton cache is warm."""
    grad_norm: float
    repeats: int


def summarise(results: Sequence[Result]) -> list[Summary]:
    """Returns one summary for each system, in the order of measurement."""
    found = []
    for system in dict.fromkeys(result.system for result in results):
        of_system = [result for result in results if result.system == system]
        rates = [result.tokens_per_second for result in of_system]

        median = statistics.median(rates)
        between = (max(rates) - min(rates)) / median if median else 0.0

        found.append(
            Summary(
                system=system,
                tokens_per_second=median,
                spread=between if len(rates) > 1 else of_system[0].spread,
                peak_gib=max(result.peak_gib for result in of_system),
                planned_gib=of_system[0].planned_gib,
                max_tokens=max(result.max_tokens or 0 for result in of_system) or None,
                first_step_s=min(result.first_step_s for result in of_system),
                grad_norm=statistics.median(result.grad_norm for result in of_system),
                repeats=len(of_system),
            )
        )
    return found


def ratio(summaries: Sequence[Summary], ours: Summary, peer: str) -> float | None:
    """Returns speed divided by the speed of `peer`; None if `peer` was not measured."""
    return next((ours.tokens_per_second / one.tokens_per_second for one in summaries if one.system == peer), None)
