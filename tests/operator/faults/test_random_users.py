"""Users who edit, suspend, delete and make jobs again in any order, while pods end and the operator is killed: whatever
they do, each job comes to the end that its pods have earned."""

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from kubernetes.client.exceptions import ApiException

from finetune_api.failures import ExitCode
from finetune_api.vocabulary import JOB_UID_LABEL
from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.faults.bench import Bench
from finetune_test_operator.faults.lives import INTERRUPTED, patience
from finetune_test_operator.faults.mutants import write_mutant
from finetune_test_operator.faults.plans import Lane
from finetune_test_operator.jobs import Outcomes
from finetune_test_operator.played_kubelet import wait_for

pytestmark = pytest.mark.cluster

SLOTS = st.sampled_from(["a", "b"])
CHECKPOINT_SECONDS = 1.0  # that a trainer takes to stop
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
        self._uids: dict[str, str] = {}  # by slot: of the jobs that exist
        self._is_held: dict[str, bool] = {}
        self._interrupted: set[str] = set()  # UIDs of jobs of which a pod was ended
        self._told: dict[str, float] = {}  # by pod: when it was seen to have been told to stop
        self._ended: dict[str, str] = {}  # by UID of the job: its phase once its pod has ended

    def _name(self, slot: str) -> str:
        return f"user-{self._number}-{slot}"

    @rule(slot=SLOTS, held=st.booleans())
    def create(self, slot: str, held: bool) -> None:
        if slot not in self._uids:
            self._uids[slot] = self._stage.create(self._name(slot), suspend=held, maxRetries=0)
            self._is_held[slot] = held

    @precondition(lambda self: self._uids)
    @rule(slot=SLOTS, held=st.booleans())
    def suspend_or_resume(self, slot: str, held: bool) -> None:
        if slot in self._uids:
            self._stage.jobs.patch_run_policy(self._name(slot), suspend=held)
            self._is_held[slot] = held

    @precondition(lambda self: self._uids)
    @rule(
        slot=SLOTS, seconds=st.sampled_from([3600, 86_400, None]), field=st.sampled_from(["active", "ttl", "startup"])
    )
    def edit(self, slot: str, seconds: int | None, field: str) -> None:
        names = {
            "active": "activeDeadlineSeconds",
            "ttl": "ttlSecondsAfterFinished",
            "startup": "startupDeadlineSeconds",
        }
        if slot in self._uids:
            self._stage.jobs.patch_run_policy(self._name(slot), **{names[field]: seconds})

    @precondition(lambda self: self._uids)
    @rule(slot=SLOTS, propagation=st.sampled_from(["Background", "Foreground"]))
    def delete(self, slot: str, propagation: str) -> None:
        if self._uids.pop(slot, None) is not None:
            self._stage.jobs.delete(self._name(slot), propagation)
            if propagation == "Foreground":  # the name is free once all pods are gone
                self._play_until(lambda: not self._stage.informer.get("finetunejobs", self._name(slot)), slot)

    @precondition(lambda self: self._uids)
    @rule(slot=SLOTS)
    def make_again(self, slot: str) -> None:
        """As `finetune retry` does: the pod of the first job still writes its checkpoint when the second one begins."""
        if slot in self._uids:
            self.run_a_pod(slot)
            self._stage.jobs.delete(self._name(slot))
            self._uids[slot] = self._stage.create(self._name(slot), maxRetries=0)
            self._is_held[slot] = False
            self.run_a_pod(slot)

    @precondition(lambda self: self._uids)
    @rule(slot=SLOTS)
    def run_a_pod(self, slot: str) -> None:
        """Users are quicker than pods; so here they wait for one, if one must come."""
        uid = self._uids.get(slot)
        if uid is None or self._is_held[slot] or uid in self._ended:
            return

        def runs() -> bool:
            for pod in self._pods(slot, "Pending"):
                self._run(pod)
            return any(pod.metadata.labels[JOB_UID_LABEL] == uid for pod in self._pods(slot, "Running"))

        wait_for(runs, f"{self._name(slot)}: a pod of job {uid} runs", patience())

    @precondition(lambda self: self._uids)
    @rule(slot=SLOTS, code=st.sampled_from(list(ENDS)))
    def end_a_pod(self, slot: str, code: ExitCode) -> None:
        # The Job controller waits 10 s for the pod after an interruption, and twice as long each time.
        uid = self._uids.get(slot, "")
        if code is ExitCode.INTERRUPTED and uid in self._interrupted:
            return
        for pod in self._pods(slot, "Running"):
            self._end(slot, pod, code)
            self._interrupted.add(uid)

    @rule()
    def kill_the_operator(self) -> None:
        self.bench.kill()

    @invariant()
    def nothing_is_that_must_never_be(self) -> None:
        for slot in ("a", "b"):
            assert self.bench.watcher.violations.get(self._name(slot), []) == []

    def teardown(self) -> None:
        """Every job that is left is resumed and comes to its end; nothing is left of those that are deleted."""
        for slot in self._uids:
            self._stage.jobs.patch_run_policy(self._name(slot), suspend=False)
        for slot in ("a", "b"):
            self._play_until(lambda slot=slot: self._is_over(slot), slot)  # type: ignore[misc]
        for slot, uid in self._uids.items():
            status = self._stage.status(self._name(slot))
            assert status["phase"] == self._ended.get(uid, "Succeeded"), status
        self.nothing_is_that_must_never_be()

    def _is_over(self, slot: str) -> bool:
        name = self._name(slot)
        job = self._stage.informer.get("finetunejobs", name)
        if slot not in self._uids:
            return not (job or any(self._stage.found(kind, name) for kind in ("jobs", "pods", "configmaps")))

        # The informer may still show the job of that name that was deleted.
        status = (job or {}).get("status") or {}
        if job is None or job["metadata"]["uid"] != self._uids[slot]:
            return False
        is_seen = status.get("observedGeneration") == job["metadata"]["generation"]
        return is_seen and status.get("phase") in ("Succeeded", "Failed")

    def _play_until(self, holds: Any, slot: str) -> None:
        """Do what a kubelet does until something holds: run what is to run, end it well, take away what must stop."""

        def play() -> bool:
            for pod in self._pods(slot, "Pending"):
                self._run(pod)
            for pod in self._pods(slot, "Running"):
                self._end(slot, pod, ExitCode.SUCCESS)
            return bool(holds())

        wait_for(play, f"{self._name(slot)}: its end; {self._stage.status(self._name(slot))}", patience())

    def _pods(self, slot: str, phase: str) -> list[Any]:
        """The trainer's pods in a phase; those that are told to stop are stopped, and go."""
        found = []
        for pod in self._stage.found("pods", self._name(slot)):
            whole = self._stage.kubelet.find(pod["metadata"]["name"])
            if whole is None:
                continue
            if whole.metadata.deletion_timestamp:
                self._stop(whole)
            elif whole.status.phase == phase == pod["status"].get("phase"):
                found.append(whole)
        return found

    def _run(self, pod: Any) -> None:
        """Run a pod, unless it was told to stop since it was read: then the API server refuses to bind it to a node."""
        try:
            self._stage.kubelet.run(pod)
        except ApiException as error:
            if error.status != 409:
                raise

    def _stop(self, pod: Any) -> None:
        """Take a pod away that is told to stop, maybe while it was ending; one that runs writes its checkpoint."""
        told = self._told.setdefault(pod.metadata.uid, time.monotonic())
        if time.monotonic() - told < CHECKPOINT_SECONDS:
            return
        if pod.status.phase == "Running":
            self._stage.kubelet.end(pod, ExitCode.INTERRUPTED, INTERRUPTED.encode())
        self._stage.kubelet.remove(pod)

    def _end(self, slot: str, pod: Any, code: ExitCode) -> None:
        phase, words = ENDS[code]
        self._stage.kubelet.end(pod, code, words.encode())
        if phase:
            self._ended.setdefault(pod.metadata.labels[JOB_UID_LABEL], phase)


@contextmanager
def users_of(cluster: DevCluster, folder: Path, code: Path | None = None) -> Iterator[type[Users]]:
    """Users of an operator that may be killed. `code`: as of a bench."""
    with Bench.start(cluster, folder / "bench", f"faults-users-{next(_numbers)}", Lane.KILLS, code) as bench:
        bench.wait_until_up()
        Users.bench = bench
        yield Users


def _settings(examples: int, steps: int, derandomize: bool) -> settings:
    # Failures are not shrunk: every run takes seconds, and depends on time.
    return settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, derandomize=derandomize,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate], print_blob=True,
    )  # fmt: skip


def test_whatever_users_do_a_job_comes_to_its_end(
    dev_cluster: DevCluster, tmp_path: Path, no_other_operator: None
) -> None:
    with users_of(dev_cluster, tmp_path) as users:
        run_state_machine_as_test(users, settings=_settings(6, 12, True))
        assert users.bench.leaks() == []


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_whatever_many_users_do_a_job_comes_to_its_end(
    dev_cluster: DevCluster, tmp_path: Path, no_other_operator: None
) -> None:
    with users_of(dev_cluster, tmp_path) as users:
        many = seed(int(os.environ.get("FAULTS_SEED", "1")))(users)
        run_state_machine_as_test(many, settings=_settings(30, 25, False))
        assert users.bench.leaks() == []


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_users_find_an_operator_that_does_not_wait_for_the_pods_of_a_deleted_job(
    dev_cluster: DevCluster, tmp_path: Path, no_other_operator: None
) -> None:
    line = "if run.job is not None or former is None:"
    code = write_mutant(tmp_path / "code", "decide/shared.py", line, "if True:")
    with users_of(dev_cluster, tmp_path, code) as users:
        with pytest.raises((AssertionError, ExceptionGroup)):
            run_state_machine_as_test(users, settings=_settings(60, 25, True))
        found = [each for violations in users.bench.watcher.violations.values() for each in violations]
    assert "2 trainers at once" in found
