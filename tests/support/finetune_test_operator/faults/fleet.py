"""A fleet: benches of one API server, on which all plans are tried at once, each with plans that do not disturb it."""

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.faults.bench import Bench, References, Result
from finetune_test_operator.faults.lives import LIVES
from finetune_test_operator.faults.oracle import EndState
from finetune_test_operator.faults.plans import SLOW, Lane, Plan, count_places, generate

PROGRESS = 50  # plans, after which a line says so
REFERENCES = 2  # lives without a fault, of each kind
TRIES = 3
"""Lives in which a plan may find its moment: of two changes that fall together, a busy operator makes one write."""

SIZES: Final = {Lane.REQUESTS: (1, 12), Lane.EVENTS: (1, 6), Lane.SILENCES: (4, 1), Lane.KILLS: (3, 2)}
"""Benches of each lane, and lives at once on each: plans that disturb the others share their operator with few."""


@dataclass
class Fleet:
    """Benches by lane."""

    benches: dict[Lane, list[Bench]]
    sizes: Mapping[Lane, tuple[int, int]]
    references: References = field(default_factory=dict)

    @classmethod
    @contextmanager
    def start(
        cls,
        cluster: DevCluster,
        folder: Path,
        prefix: str,
        sizes: Mapping[Lane, tuple[int, int]] = SIZES,
        code: Path | None = None,
    ) -> Iterator[Self]:
        """Start the benches in namespaces of that prefix. References need the lane of requests. `code`: as of a
        bench."""
        with ExitStack() as stack:
            fleet = cls({lane: [] for lane in sizes}, sizes)
            for lane, (count, _) in sizes.items():
                for number in range(count):
                    namespace = f"{prefix}-{lane.name.lower()}-{number}"
                    bench = Bench.start(cluster, folder / namespace, namespace, lane, code)
                    fleet.benches[lane].append(stack.enter_context(bench))
            yield fleet

    @property
    def restarts(self) -> int:
        """How often operators were started again."""
        return sum(bench.restarts for bench in self._all())

    def live_references(self, lives: Iterable[str] = tuple(LIVES)) -> list[Plan]:
        """Live each life undisturbed, and generate its plans from what was seen."""
        bench = self.benches[Lane.REQUESTS][0]
        bench.wait_until_up()
        kinds = [life for life in lives for _ in range(REFERENCES)]
        with ThreadPoolExecutor(len(kinds)) as threads:
            done = list(threads.map(bench.live, kinds))
        for life, (name, course, failures) in zip(kinds, done, strict=True):
            if failures:
                raise AssertionError(f"an undisturbed life, {life}, fails: {failures}")
            self.references.setdefault(life, []).append((EndState.read(bench.stage, name, course), course))

        plans = []
        for life, seen in self.references.items():
            if differences := seen[0][0].differences(seen[1][0]):
                raise AssertionError(f"two undisturbed lives, {life}, differ: {differences}")
            plans += generate(life, [count_places(course.places) for _, course in seen])
        return plans

    def run(self, plans: Sequence[Plan]) -> list[Result]:
        """Try plans, those first that take long; returns their results in the same order.

        A plan whose moment did not come in a life is tried in another."""
        results: dict[str, Result] = {}
        waiting: dict[Lane, queue.SimpleQueue[Plan]] = {lane: queue.SimpleQueue() for lane in Lane}
        for plan in sorted(plans, key=lambda each: each.fault not in SLOW):
            waiting[plan.lane].put(plan)

        def work(lane: Lane, bench: Bench) -> None:
            bench.wait_until_up()
            with suppress(queue.Empty):
                while True:
                    plan = waiting[lane].get_nowait()
                    for _ in range(TRIES):
                        result = results[plan.name] = bench.run(plan, self.references)
                        if result.fired or result.failures:
                            break

                    if len(results) % PROGRESS == 0:
                        print(f"{len(results)} of {len(plans)} tried", flush=True)

        threads = [
            threading.Thread(target=work, args=(lane, bench), daemon=True)
            for lane, benches in self.benches.items()
            for bench in benches
            for _ in range(self.sizes[lane][1])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[plan.name] for plan in plans]

    def leaks(self) -> list[str]:
        """What is where it may not be, on every bench."""
        return [each for bench in self._all() for each in bench.leaks()]

    def _all(self) -> list[Bench]:
        return [bench for benches in self.benches.values() for bench in benches]
