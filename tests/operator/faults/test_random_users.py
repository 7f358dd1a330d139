"""Users who edit, suspend, delete and make jobs again in any order, while pods end and the operator is killed: whatever
they do, each job comes to the end that its pods have earned."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from finetune_api.base import Json
from finetune_api.failures import ExitCode
from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.faults.bench import Bench
from finetune_test_operator.faults.lives import INTERRUPTED
from finetune_test_operator.faults.plans import Lane
from finetune_test_operator.jobs import Outcomes
from finetune_test_operator.operator_process import OperatorProcess

pytestmark = pytest.mark.cluster

SLOTS = st.sampled_from(["a", "b"])
ENDS = {
    ExitCode.SUCCESS: ("Succeeded", Outcomes.success),
    ExitCode.DATA: ("Failed", Outcomes.bad_row),
    ExitCode.INTERRUPTED: ("", INTERRUPTED),
}
"""Phase of the job and last words of its pod, by the pod's exit code."""

_numbers = itertools.count()


class Users(RuleBasedStateMachine):
    """Jobs by slot; a job that is made again has the name of the one before."""

    bench: Bench

    def __init__(self) -> None:
        super().__init__()
        self._stage = self.bench.stage
        self._number = next(_numbers)
        self._is_held: dict[str, bool] = {}
        self._ended: dict[str, str] = {}  # by UID of the job: its phase once its pod has ended

    def _name(self, slot: str) -> str:
        return f"user-{self._number}-{slot}"

    @rule(slot=SLOTS, held=st.booleans())
    def create(self, slot: str, held: bool) -> None:
        if slot not in self._is_held:
            self._stage.create(self._name(slot), suspend=held, maxRetries=0)
            self._is_held[slot] = held

    @precondition(lambda self: self._is_held)
    @rule(slot=SLOTS, held=st.booleans())
    def suspend_or_resume(self, slot: str, held: bool) -> None:
        if slot in self._is_held:
            self._stage.jobs.patch_run_policy(self._name(slot), suspend=held)
            self._is_held[slot] = held

    @precondition(lambda self: self._is_held)
    @rule(
        slot=SLOTS, seconds=st.sampled_from([3600, 86_400, None]), field=st.sampled_from(["active", "ttl", "startup"])
    )
    def edit(self, slot: str, seconds: int | None, field: str) -> None:
        names = {
            "active": "activeDeadlineSeconds",
            "ttl": "ttlSecondsAfterFinished",
            "startup": "startupDeadlineSeconds",
        }
        if slot in self._is_held:
            self._stage.jobs.patch_run_policy(self._name(slot), **{names[field]: seconds})

    @precondition(lambda self: self._is_held)
    @rule(slot=SLOTS, propagation=st.sampled_from(["Background", "Foreground"]))
    def delete(self, slot: str, propagation: str) -> None:
        if self._is_held.pop(slot, None) is not None:
            self._stage.jobs.delete(self._name(slot), propagation)
            if propagation == "Foreground":  # the name is free once all pods are gone
                self._play_until(lambda: not self._stage.informer.get("finetunejobs", self._name(slot)), slot)

    @precondition(lambda self: self._is_held)
    @rule(slot=SLOTS)
    def run_a_pod(self, slot: str) -> None:
        for pod in self._pods(slot, "Pending"):
            self._stage.kubelet.run(pod)

    @precondition(lambda self: self._is_held)
    @rule(slot=SLOTS, code=st.sampled_from(list(ENDS)))
    def end_a_pod(self, slot: str, code: ExitCode) -> None:
        for pod in self._pods(slot, "Running"):
            self._end(slot, pod, code)

    @rule()
    def kill_the_operator(self) -> None:
        self.bench.kill()

    @invariant()
    def nothing_is_that_must_never_be(self) -> None:
        for slot in ("a", "b"):
            assert self.bench.watcher.violations.get(self._name(slot), []) == []

    def teardown(self) -> None:
        """Every job that is left is resumed and comes to its end; nothing is left of those that are deleted."""
        for slot in self._is_held:
            self._stage.jobs.patch_run_policy(self._name(slot), suspend=False)
        for slot in ("a", "b"):
            self._play_until(lambda slot=slot: self._is_over(slot), slot)  # type: ignore[misc]
            job = self._stage.informer.get("finetunejobs", self._name(slot))
            if job is not None:
                assert job["status"]["phase"] == self._ended.get(job["metadata"]["uid"], "Succeeded"), job["status"]
        self.nothing_is_that_must_never_be()

    def _is_over(self, slot: str) -> bool:
        name = self._name(slot)
        if slot not in self._is_held:
            kinds = ("finetunejobs", "jobs", "pods", "configmaps")
            return not any(self._stage.found(kind, name) for kind in kinds[1:])
        job = self._stage.informer.get("finetunejobs", name) or {"metadata": {}}
        status: Json = job.get("status") or {}
        seen = status.get("observedGeneration") == job["metadata"].get("generation")
        return seen and status.get("phase") in ("Succeeded", "Failed")

    def _play_until(self, holds: Any, slot: str) -> None:
        """Do what a kubelet does until something holds: run what is to run, end it well, take away what must stop."""

        def play() -> bool:
            for pod in self._pods(slot, "Pending"):
                self._stage.kubelet.run(pod)
            for pod in self._pods(slot, "Running"):
                self._end(slot, pod, ExitCode.SUCCESS)
            return bool(holds())

        self._stage.wait_for(play, f"{self._name(slot)}: its end")

    def _pods(self, slot: str, phase: str) -> list[Any]:
        """The trainer's pods in a phase; those that are told to stop are stopped."""
        found = []
        for pod in self._stage.found("pods", self._name(slot)):
            if pod["status"].get("phase") != phase:
                continue
            whole = self._stage.kubelet.find(pod["metadata"]["name"])
            if whole is None or whole.status.phase != phase:
                continue
            if whole.metadata.deletion_timestamp:
                if whole.status.phase == "Running":
                    self._stage.kubelet.end(whole, ExitCode.INTERRUPTED, INTERRUPTED.encode())
                self._stage.kubelet.remove(whole)
            else:
                found.append(whole)
        return found

    def _end(self, slot: str, pod: Any, code: ExitCode) -> None:
        phase, words = ENDS[code]
        self._stage.kubelet.end(pod, code, words.encode())
        if phase:
            self._ended.setdefault(pod.metadata.labels["finetune.dev/job-uid"], phase)


@pytest.fixture
def users(dev_cluster: DevCluster, operator_process: OperatorProcess, tmp_path: Path) -> Iterator[type[Users]]:
    """Users of an operator that may be killed, in place of the operator of all tests."""
    operator_process.kill()
    with Bench.start(dev_cluster, tmp_path / "bench", f"faults-users-{next(_numbers)}", Lane.KILLS) as bench:
        bench.wait_until_up()
        Users.bench = bench
        yield Users
        assert bench.leaks() == []


def _settings(examples: int, steps: int, derandomize: bool) -> settings:
    checks = list(HealthCheck)
    return settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, derandomize=derandomize,
        suppress_health_check=checks, print_blob=True,
    )  # fmt: skip


def test_whatever_users_do_a_job_comes_to_its_end(users: type[Users]) -> None:
    run_state_machine_as_test(users, settings=_settings(12, 15, True))


@pytest.mark.faults
def test_whatever_many_users_do_a_job_comes_to_its_end(users: type[Users]) -> None:
    many = seed(int(os.environ.get("FAULTS_SEED", "1")))(users)
    run_state_machine_as_test(many, settings=_settings(30, 25, False))
