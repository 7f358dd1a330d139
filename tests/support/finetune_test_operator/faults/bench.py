"""A bench: one namespace with an operator behind a fault proxy, on which many lives are lived at once."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.faults.fault_proxy import Course, FaultProxy
from finetune_test_operator.faults.informer import Informer
from finetune_test_operator.faults.lives import LIVES, SECRET, Stage
from finetune_test_operator.faults.oracle import CANARY, EndState, Watcher, check_effort, find_canary, find_orphans
from finetune_test_operator.faults.plans import Lane, Plan
from finetune_test_operator.jobs import Jobs
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

QUIET_SECONDS = 1.5  # after which a job that is over must not have changed
CONVERGE_SECONDS = 15.0
"""Time in which a job that is over must come to equal its reference: the last write of a busy operator may be late."""

START_SECONDS = 120.0
References = dict[str, list[tuple[EndState, Course]]]
"""By life: ends and courses of undisturbed ones. What differs between them is not compared."""


@dataclass
class Result:
    """What became of one plan."""

    plan: Plan
    fired: bool
    seconds: float
    failures: list[str]


@dataclass
class Bench:
    """The operator is started again whenever it ends, as a kubelet would."""

    stage: Stage
    proxy: FaultProxy
    operator: OperatorProcess
    watcher: Watcher
    restarts: int = -1  # the first start is none
    log: str = ""
    """Logs of the operators that have ended."""

    _number: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_up: threading.Event = field(default_factory=threading.Event)
    _is_closing: threading.Event = field(default_factory=threading.Event)

    @classmethod
    @contextmanager
    def start(
        cls, cluster: DevCluster, folder: Path, namespace: str, lane: Lane, code: Path | None = None
    ) -> Iterator[Self]:
        """Start all parts; `wait_until_up` waits for the operator. `code`: a folder with another `finetune_operator`,
        such as a mutant."""
        core: Any = client.CoreV1Api(cluster.api_client())
        core.create_namespace({"metadata": {"name": namespace}})
        secret = {"metadata": {"name": SECRET}, "stringData": {"AWS_SECRET_ACCESS_KEY": CANARY, "HF_TOKEN": CANARY}}
        core.create_namespaced_secret(namespace, secret)
        operator = OperatorProcess(cluster, folder, namespace, lease_namespace=namespace)
        operator.code = code
        watcher, informer = Watcher(), Informer(cluster, namespace)
        is_seen = lane is Lane.REQUESTS
        stage = Stage(Jobs(cluster, namespace), PlayedKubelet(cluster, namespace), informer, is_seen)

        with FaultProxy.start(cluster) as proxy:
            bench = cls(stage, proxy, operator, watcher)
            proxy.kill = bench.kill
            informer.start({"finetunejobs": watcher.see_job, "pods": watcher.see_pod})
            # A program dies with the thread that started it, so all starts are this one's.
            keeper = threading.Thread(target=bench._keep_running, daemon=True)
            keeper.start()
            try:
                yield bench
            finally:
                bench._is_closing.set()
                keeper.join(START_SECONDS)
                informer.stop()
                core.delete_namespace(namespace)  # takes a while, and nobody waits for it

    def wait_until_up(self) -> None:
        """Wait for the first operator."""
        if not self._is_up.wait(START_SECONDS):
            raise TimeoutError(f"{self.stage.jobs.namespace}: no operator runs")

    def kill(self) -> None:
        """End the operator at once."""
        with suppress(ProcessLookupError):
            self.operator.signal(signal.SIGKILL)

    def live(self, life: str, plan: Plan | None = None) -> tuple[str, Course, list[str]]:
        """Live a life to its end; returns its job, its course and what went wrong."""
        with self._lock:
            self._number += 1
            name, failures = f"life-{self._number:04}", []
        course = self.proxy.courses[name]
        course.plan = plan

        try:
            LIVES[life](self.stage, name)
            self.proxy.is_over(name)
            self.stage.informer.wait_for_quiet("finetunejobs", name, QUIET_SECONDS)
        except (TimeoutError, AssertionError, HTTPError, ApiException) as error:
            failures.append(f"{type(error).__name__}: {error}")
        return name, course, failures + sorted(set(self.watcher.violations.get(name, [])))

    def run(self, plan: Plan, references: References) -> Result:
        """Try one plan, and judge its life beside the references."""
        began = time.monotonic()
        name, course, failures = self.live(plan.life, plan)
        seen = references[plan.life]
        if not failures:
            failures += self._differences(name, course, [state for state, _ in seen])
        failures += check_effort(course, max((each for _, each in seen), key=lambda each: len(each.places)))

        if failures:
            print(f"LOST {plan.name} ({self.stage.jobs.namespace}/{name}): {'; '.join(failures)[:900]}", flush=True)
        return Result(plan, course.fired, time.monotonic() - began, failures)

    def leaks(self) -> list[str]:
        """What is where it may not be: the secret's value, and children without a job."""
        secrets = find_canary(self.stage, self.log + self.operator.log)
        return [f"{self.stage.jobs.namespace}: {each}" for each in secrets + find_orphans(self.stage)]

    def _differences(self, name: str, course: Course, references: list[EndState]) -> list[str]:
        deadline = time.monotonic() + CONVERGE_SECONDS
        while True:
            state = EndState.read(self.stage, name, course)
            let_go = course.plan.let_go if course.plan else 0
            found = min((state.differences(each, let_go) for each in references), key=len)
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(1)

    def _keep_running(self) -> None:
        while not self._is_closing.is_set():
            if self.restarts >= 0:
                self.log += self.operator.log
            self.restarts += 1
            try:
                self.operator.start(api_port=self.proxy.port)
                self._is_up.set()
            except RuntimeError:  # it was killed again before it was ready
                continue
            except TimeoutError:
                self.operator.kill()
            while self.operator.is_running and not self._is_closing.wait(0.1):
                pass
        self.operator.kill()
