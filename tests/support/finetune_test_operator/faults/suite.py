"""Runs fault plans: `python -m finetune_test_operator.faults.suite`, which `make faults` does.

Environment: `FAULTS_SEED` and `FAULTS_PLANS` choose a sample of what is generated (about 2,000 plans; 400 by default),
`FAULTS_PLAN` names one plan to run again. Every plan and its result is written to faults.csv.
"""

import csv
import os
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.faults.fault_proxy import Course, FaultProxy
from finetune_test_operator.faults.lives import LIVES, Stage, settle
from finetune_test_operator.faults.oracle import CANARY, EndState, Watcher, check_effort, find_canary
from finetune_test_operator.faults.plans import KILLS, SLOW, Plan, count_places, generate, sample
from finetune_test_operator.jobs import Jobs
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

DEFAULT_PLANS = 400
REFERENCES = 2  # lives without a fault, of each kind; what differs between them is not compared
AT_ONCE = 12
KILLED_AT_ONCE = 6  # each kill ends all lives' operator: more of them would keep it from ever starting
QUIET_SECONDS = 1.5  # after which a job that is over must not have changed


@dataclass
class Result:
    """What became of one plan."""

    plan: Plan
    fired: bool
    seconds: float
    failures: list[str]


@dataclass
class Bench:
    """One namespace with an operator behind a proxy, which is started again whenever it ends, as a kubelet would."""

    stage: Stage
    proxy: FaultProxy
    operator: OperatorProcess
    watcher: Watcher
    references: dict[str, list[tuple[EndState, Course]]] = field(default_factory=dict)
    restarts: int = 0
    log: str = ""
    """Logs of the operators that have ended."""

    _number: int = 0
    _stopping: threading.Event = field(default_factory=threading.Event)

    @classmethod
    @contextmanager
    def start(cls, cluster: DevCluster, folder: Path, namespace: str, code: Path | None = None) -> Iterator["Bench"]:
        """Start all parts. `code`: a folder with another `finetune_operator`, such as a mutant."""
        core: Any = client.CoreV1Api(cluster.api_client())
        core.create_namespace({"metadata": {"name": namespace}})
        secret = {"metadata": {"name": "canary"}, "stringData": {"AWS_SECRET_ACCESS_KEY": CANARY, "HF_TOKEN": CANARY}}
        core.create_namespaced_secret(namespace, secret)
        stage, watcher = Stage(Jobs(cluster, namespace), PlayedKubelet(cluster, namespace)), Watcher(namespace)

        with FaultProxy.start(cluster) as proxy:
            operator = OperatorProcess(cluster, folder, namespace, lease_namespace=namespace)
            operator.code = code
            bench = cls(stage, proxy, operator, watcher)
            proxy.kill = bench._kill
            operator.start(api_port=proxy.port)
            watcher.start(cluster)
            keeper = threading.Thread(target=bench._keep_running, daemon=True)
            keeper.start()
            try:
                yield bench
            finally:
                bench._stopping.set()
                keeper.join(40)
                operator.kill()
                watcher.stop()
                core.delete_namespace(namespace)  # takes a while, and nobody waits for it

    def run(self, plans: Sequence[Plan]) -> list[Result]:
        """Run plans, those that kill apart from the others."""
        killing = [plan for plan in plans if plan.fault in KILLS]
        others = [plan for plan in plans if plan.fault not in KILLS]
        return self._run_at_once(others, AT_ONCE) + self._run_at_once(killing, KILLED_AT_ONCE)

    def live_references(self, lives: Iterable[str] = tuple(LIVES)) -> list[Plan]:
        """Live each life undisturbed, and generate its plans from what was seen."""
        kinds = [life for life in lives for _ in range(REFERENCES)]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            done = list(threads.map(self._live, kinds))
        for life, (state, course, failures, _) in zip(kinds, done, strict=True):
            if failures or state is None:
                raise AssertionError(f"an undisturbed life, {life}, fails: {failures}")
            self.references.setdefault(life, []).append((state, course))

        plans = []
        for life, seen in self.references.items():
            if differences := seen[0][0].differences(seen[1][0]):
                raise AssertionError(f"two undisturbed lives, {life}, differ: {differences}")
            plans += generate(life, [count_places(course.places) for _, course in seen])
        return plans

    def _run_at_once(self, plans: Sequence[Plan], count: int) -> list[Result]:
        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(self._try, plans))

    def _try(self, plan: Plan) -> Result:
        state, course, failures, seconds = self._live(plan.life, plan)
        reference = self.references[plan.life]
        if state is not None:
            failures += min([state.differences(each) for each, _ in reference], key=lambda found: len(list(found)))
        failures += check_effort(course, max((each for _, each in reference), key=lambda each: len(each.places)))
        if failures:
            print(f"LOST {plan.name}: {'; '.join(failures)[:600]}", flush=True)
        return Result(plan, course.fired, seconds, failures)

    def _live(self, life: str, plan: Plan | None = None) -> tuple[EndState | None, Course, list[str], float]:
        self._number += 1
        name, began, failures = f"life-{self._number:04}", time.monotonic(), []
        course, state = self.proxy.courses[name], None
        course.plan = plan
        try:
            LIVES[life](self.stage, name)
            self.proxy.is_over(name)
            settle(self.stage, name, QUIET_SECONDS)
            state = EndState.read(self.stage, name, course)
        except (TimeoutError, AssertionError, HTTPError, ApiException) as error:
            failures.append(f"{type(error).__name__}: {error}")
        failures += sorted(set(self.watcher.violations.get(name, [])))
        return state, course, failures, time.monotonic() - began

    def secrets(self) -> list[str]:
        """Where the canary's value has come to."""
        return find_canary(self.stage, self.log + self.operator.log)

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            self.operator.signal(signal.SIGKILL)

    def _keep_running(self) -> None:
        while not self._stopping.wait(0.1):
            if self.operator.is_running:
                continue
            self.log += self.operator.log
            self.restarts += 1
            with suppress(RuntimeError):  # it was killed again before it was ready
                self.operator.start(api_port=self.proxy.port)


def quick(plans: Iterable[Plan]) -> list[Plan]:
    """Plans whose faults are noticed at once."""
    return [plan for plan in plans if plan.fault not in SLOW]


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
        Bench.start(cluster, Path(folder), "faults") as bench,
    ):
        plans = bench.live_references()
        chosen = [Plan.parse(one)] if one else sample(plans, count, seed)
        print(f"{len(plans)} plans generated, {len(chosen)} to run", flush=True)
        results, secrets, restarts = bench.run(chosen), bench.secrets(), bench.restarts

    _write(Path("faults.csv"), results)
    print(table(results))
    print(
        f"{time.monotonic() - began:.0f} s, {restarts} restarts of the operator, secrets found in: {secrets or 'none'}"
    )
    return int(bool(secrets) or any(result.failures for result in results))


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
