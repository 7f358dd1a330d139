"""Profile of one step: GPU time by category and by kernel, gaps between kernels, and the CPU's launch time."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A kernel belongs to the first category with a word that is part of its name (lower case).
CATEGORIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("copies", ("memcpy", "memset")),
    ("attention", ("flash", "sdpa", "fmha", "cudnn", "attention")),
    ("decoding", ("_decode", "dequantize")),
    ("optimiser", ("optimizer", "multi_tensor")),
    ("small products", ("splitkreduce", "badd")),
    ("large products", ("nvjet", "gemm", "cutlass", "xmma")),
)
OTHERS = "element-wise"
TILE = re.compile(r"_(\d+)x(\d+)_")


@dataclass(frozen=True)
class Span:
    """One kernel's run, in microseconds."""

    name: str
    begin: float
    end: float


def category(name: str) -> str:
    """Returns the category of a kernel by its name.

    Products with a LoRA rank as a dimension have tiles with a side of 16 to 64, or add to their output (badd).
    """
    lower = name.lower()
    found = next((title for title, words in CATEGORIES if any(word in lower for word in words)), OTHERS)
    tile = TILE.search(lower) if found == "large products" else None
    return "small products" if tile is not None and min(map(int, tile.groups())) <= 64 else found


def totals(spans: Iterable[Span]) -> list[tuple[str, int, float]]:
    """Returns (name, launches, milliseconds) of each kernel, the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        found[span.name].append(span.end - span.begin)
    return sorted(((name, len(times), sum(times) / 1e3) for name, times in found.items()), key=lambda one: -one[2])


def gaps(spans: Iterable[Span]) -> list[tuple[str, str, float]]:
    """Returns (kernel before, kernel after, milliseconds) of every gap between kernels, the longest first."""
    found: list[tuple[str, str, float]] = []
    before: Span | None = None

    for span in sorted(spans, key=lambda one: one.begin):
        if before is not None and span.begin > before.end:
            found.append((before.name, span.name, (span.begin - before.end) / 1e3))
        if before is None or span.end > before.end:
            before = span

    return sorted(found, key=lambda one: -one[2])


def by_category(spans: Sequence[Span]) -> dict[str, float]:
    """Returns {category: milliseconds}, with the idle time."""
    found: dict[str, float] = defaultdict(float)
    for name, _, milliseconds in totals(spans):
        found[category(name)] += milliseconds
    return dict(sorted(found.items(), key=lambda one: -one[1])) | {"idle": sum(gap for _, _, gap in gaps(spans))}


def make_profiler(first: int) -> Any:
    """Returns a callback that profiles the second step after step `first`; its `write` makes three CSV files."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    class Profiler(TrainerCallback):
        def __init__(self) -> None:
            self._profile = profile(activities=[ProfilerActivity.CUDA], acc_events=True)

        def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if state.global_step == first + 1:
                torch.cuda.synchronize()
                self._profile.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if state.global_step == first + 2:
                torch.cuda.synchronize()
                self._profile.stop()

        def spans(self) -> list[Span]:
            cuda = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
            return [
                Span(event.name, event.time_range.start, event.time_range.end)
                for event in self._profile.events()  # type: ignore[no-untyped-call]
                if event.device_type == cuda and not event.name.startswith(("ProfilerStep", "## "))
            ]

        def write(self, folder: Path, name: str, launching: float) -> None:
            spans = self.spans()
            folder.mkdir(parents=True, exist_ok=True)
            parts = by_category(spans) | {"until launched (CPU)": 1e3 * launching}
            write_rows(folder / f"{name}-categories.csv", ("category", "milliseconds"), parts.items())
            write_rows(folder / f"{name}-kernels.csv", ("kernel", "launches", "milliseconds"), totals(spans)[:40])
            write_rows(folder / f"{name}-gaps.csv", ("after", "before", "milliseconds"), gaps(spans)[:40])

    return Profiler()


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file; numbers are rounded to two decimals."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow(round(value, 2) if isinstance(value, float) else value for value in row)
