"""Sets the paired differences of two variants beside the spread of the seeds.

A pair is one model with one seed in both variants. The rule (issue of the engine's second part): the mean of the paired
differences, whatever its sign, has to be below half of the seeds' spread, the standard deviation of the first variant's
losses, for every model.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_SEEDS = 3


@dataclass(frozen=True)
class Comparison:
    """One model's losses of one kind, in both variants, by seed."""

    model: str
    first: Sequence[float]
    second: Sequence[float]

    @property
    def differences(self) -> list[float]:
        """Differences of the second variant from the first, one for each seed."""
        return [second - first for first, second in zip(self.first, self.second, strict=True)]

    @property
    def difference(self) -> float:
        """Mean of the paired differences."""
        return statistics.mean(self.differences)

    @property
    def spread(self) -> float:
        """Standard deviation of the first variant's losses over the seeds; 0 of a single one."""
        return statistics.stdev(self.first) if len(self.first) > 1 else 0.0

    @property
    def is_equal(self) -> bool:
        """True if the rule holds for this model."""
        return len(self.first) >= MIN_SEEDS and abs(self.difference) < self.spread / 2


def compare(rows: Iterable[Mapping[str, Any]], variants: tuple[str, str], loss: str) -> list[Comparison]:
    """Returns a comparison for each model, of the seeds that both variants have. `loss` names the column."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for row in rows:
        found.setdefault(row["model"], {})[row["variant"], int(row["seed"])] = float(row[loss])

    comparisons = []
    for model, losses in found.items():
        seeds = sorted({seed for _, seed in losses if all((variant, seed) in losses for variant in variants)})
        if seeds:
            first, second = ([losses[variant, seed] for seed in seeds] for variant in variants)
            comparisons.append(Comparison(model, first, second))
    return comparisons


def table(comparisons: Sequence[Comparison], variants: tuple[str, str]) -> str:
    """The comparisons as text, a line for each model."""
    first, second = variants
    lines = [f"{'model':<14} {first:>9} {second:>9} {'paired differences':>32} {'mean':>9} {'spread/2':>9}  holds"]
    for one in comparisons:
        pairs = " ".join(f"{difference:+.6f}" for difference in one.differences)
        means = f"{statistics.mean(one.first):9.5f} {statistics.mean(one.second):9.5f}"
        holds = "yes" if one.is_equal else "no"
        lines.append(f"{one.model:<14} {means} {pairs:>32} {one.difference:+.6f} {one.spread / 2:9.6f}  {holds}")
    return "\n".join(lines)


def verdict(comparisons: Sequence[Comparison], models: int) -> str:
    """One sentence: does the rule hold for all `models`?"""
    failing = [one.model for one in comparisons if not one.is_equal]
    if len(comparisons) < models:
        return f"no verdict: only {len(comparisons)} of {models} models have pairs"
    if failing:
        return f"the rule does not hold for {', '.join(failing)}"
    return f"the rule holds for all {models} models"
