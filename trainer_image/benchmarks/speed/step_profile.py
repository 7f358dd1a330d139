"""Where one step's time goes: GPU time by category and by kernel, gaps between kernels, and the CPU's launch time."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The first category whose word is part of a kernel's name (lower case) takes it.
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
    """What a kernel belongs to, by its name. Products of a rank's size have tiles with a side of 16 to 64, or add to
    what is there."""
    lower = name.lower()
    found = next((title for title, words in CATEGORIES if any(word in lower for word in words)), OTHERS)
    tile = TILE.search(lower) if found == "large products" else None
    return "small products" if tile is not None and min(map(int, tile.groups())) <= 64 else found


def totals(spans: Iterable[Span]) -> list[tuple[str, int, float]]:
    """(name, launches, milliseconds) by kernel, the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        found[span.name].append(span.end - span.begin)
    return sorted(((name, len(times), sum(times) / 1e3) for name, times in found.items()), key=lambda one: -one[2])


def gaps(spans: Iterable[Span]) -> list[tuple[str, str, float]]:
    """(kernel before, kernel after, milliseconds) of every time in which none ran, the longest first."""
    found: list[tuple[str, str, float]] = []
    before: Span | None = None
    for span in sorted(spans, key=lambda one: one.begin):
        if before is not None and span.begin > before.end:
            found.append((before.name, span.name, (span.begin - before.end) / 1e3))
        if before is None or span.end > before.end:
            before = span
    return sorted(found, key=lambda one: -one[2])


def by_category(spans: Sequence[Span]) -> dict[str, float]:
    """Milliseconds by category, idle time among them."""
    found: dict[str, float] = defaultdict(float)
    for name, _, milliseconds in totals(spans):
        found[category(name)] += milliseconds
    return dict(sorted(found.items(), key=lambda one: -one[1])) | {"idle": sum(gap for _, _, gap in gaps(spans))}


def make_profiler(first: int) -> Any:
    """A callback that profiles the second of the two steps after step `first`; `write` leaves three CSV files."""
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
    """A CSV file; numbers to a hundredth."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow(round(value, 2) if isinstance(value, float) else value for value in row)
