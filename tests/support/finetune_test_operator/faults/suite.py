"""Runs fault plans: `python -m finetune_test_operator.faults.suite`, which `make faults` does.

Environment: `FAULTS_SEED` and `FAULTS_PLANS` choose a sample of what is generated (about 2,300 plans; 330 by default),
`FAULTS_PLAN` names one plan to run again. Every plan and its result is written to faults.csv.
"""

import csv
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.faults.bench import Result
from finetune_test_operator.faults.fleet import Fleet
from finetune_test_operator.faults.plans import Plan, sample

DEFAULT_PLANS = 330  # a few find their moment never, so that 300 do


def table(results: Iterable[Result]) -> str:
    """Plans run, passed and lost, a line for each class."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.plan.group].append(result)

    lines = [f"{'class':24} {'run':>5} {'fired':>6} {'passed':>7} {'lost':>5} {'seconds':>8}"]
    everything = [each for group in groups.values() for each in group]
    for name, group in [*sorted(groups.items()), ("all", everything)]:
        lost = sum(1 for each in group if each.failures)
        fired, seconds = sum(each.fired for each in group), sum(each.seconds for each in group)
        lines.append(f"{name:24} {len(group):5} {fired:6} {len(group) - lost:7} {lost:5} {seconds:8.0f}")
    return "\n".join(lines)


def main() -> int:
    """Run the suite; returns 1 if a plan is lost."""
    seed, count = int(os.environ.get("FAULTS_SEED", "1")), int(os.environ.get("FAULTS_PLANS", DEFAULT_PLANS))
    one, began = os.environ.get("FAULTS_PLAN"), time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        DevCluster.start() as cluster,
        Fleet.start(cluster, Path(folder), "faults") as fleet,
    ):
        plans = fleet.live_references()
        chosen = [Plan.parse(one)] if one else sample(plans, count, seed)
        print(f"{len(plans)} plans generated, {len(chosen)} to run", flush=True)
        results = fleet.run(chosen)
        leaks, restarts = fleet.leaks(), fleet.restarts

    _write(Path("faults.csv"), results)
    print(table(results))
    print(f"{time.monotonic() - began:.0f} s, {restarts} restarts of operators, leaks: {leaks or 'none'}")
    return int(bool(leaks) or any(result.failures for result in results))


def _write(path: Path, results: Iterable[Result]) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["plan", "class", "fired", "seconds", "failures"])
        for each in results:
            rows.writerow(
                [each.plan.name, each.plan.group, each.fired, f"{each.seconds:.1f}", "; ".join(each.failures)]
            )


if __name__ == "__main__":
    sys.exit(main())
