"""Trainers that stall, diverge or fall silent, on a real control plane: one restart, then the end, and no restart for
silence that is the operator's own."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.pod_ends.stalls import StallLimit
from finetune_api.vocabulary import Stage
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for
from finetune_test_operator.reporter import Reporter

pytestmark = pytest.mark.cluster

LIMIT = StallLimit.of(10)
SILENCE = LIMIT.silence.total_seconds()


def an_end(reason: FailureReason, code: ExitCode) -> str:
    return Outcome(
        result=Result.FAILED,
        reason=reason,
        message="the trainer says why",
        exit_code=code,
        stage=Stage.TRAINING,
        step=7,
        checkpoint_step=4,
        finished="2026-11-24T00:00:00Z",
    ).encode()


def fails_twice(jobs: Any, kubelet: PlayedKubelet, name: str, ends: tuple[FailureReason, ...], code: ExitCode) -> Any:
    """Lets two pods of a job without retries end; returns the status of the job that has failed."""
    jobs.create(name, maxRetries=0)
    for number, reason in enumerate(ends, start=1):
        pod = kubelet.wait_for_pod(name, number)
        kubelet.run(pod)
        jobs.wait(name, lambda status, seen=number: len(status.get("attempts", [])) == seen, "the attempt")
        kubelet.end(pod, code, an_end(reason, code))
        if number == 1:
            status = jobs.wait(name, lambda status: status.get("reason") == "Retrying", "the restart")["status"]
            assert (status["phase"], status["checkpointStep"]) == ("Queued", 4)
            assert status["attempts"][0]["reason"] == reason
    return jobs.wait_for_phase(name, "Failed")["status"]


@contextmanager
def failing_twice(jobs: Any, kubelet: PlayedKubelet) -> Iterator[dict[str, Any]]:
    """Jobs that fail twice while the block runs: the Job controller makes their second pods after 10 s. Yields their
    last statuses, which are complete after the block."""
    statuses: dict[str, Any] = {}

    def live(name: str, ends: tuple[FailureReason, ...], code: ExitCode) -> None:
        statuses[name] = fails_twice(jobs, kubelet, name, ends, code)

    lives = {
        "stalls": ((FailureReason.STALLED, FailureReason.STALLED), ExitCode.STALLED),
        "diverges": ((FailureReason.LOSS_DIVERGED, FailureReason.NON_FINITE_LOSS), ExitCode.DIVERGED),
    }
    threads = [threading.Thread(target=live, args=(name, *life)) for name, life in lives.items()]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        for thread in threads:
            thread.join()


def assert_restarted_once(jobs: Any, kubelet: PlayedKubelet, statuses: dict[str, Any]) -> None:
    """Checks the jobs of `failing_twice`, none of which has a retry."""
    reasons = {name: status["failure"]["reason"] for name, status in statuses.items()}
    assert reasons == {"stalls": "Stalled", "diverges": "NonFiniteLoss"}

    for name, status in statuses.items():
        assert "it happened before, in pod" in status["failure"]["message"]
        assert status["failure"]["hint"]
        assert jobs.event_reasons(name).count("Retrying") == 1
        wait_for(partial(_is_over, jobs, name), "the Job is over")
        assert len(status["attempts"]) == 2
        assert len(kubelet.pods(name)) == 2, "no third pod was made"


def _is_over(jobs: Any, name: str) -> bool:
    conditions = jobs.child(name).get("status", {}).get("conditions", [])
    return any(each["type"] in ("Failed", "FailureTarget") and each["status"] == "True" for each in conditions)


@contextmanager
def reporting(reporter: Reporter, name: str, token: str) -> Iterator[None]:
    """A trainer that reports every two seconds."""
    over = threading.Event()

    def report() -> None:
        sequence = 1
        while not over.wait(2):
            try:
                reporter.post(name, token, sequence := sequence + 1)
            except OSError:
                continue  # the operator starts again

    thread = threading.Thread(target=report)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("restarts", [False, pytest.param(True, marks=pytest.mark.stalls)])
def test_a_frozen_trainer_is_seen_and_evicted_and_others_that_stall_or_diverge_go_on_once(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, restarts: bool
) -> None:
    """A trainer that reports is not mistaken for one that is frozen, and a restart of the operator starts the clock
    anew."""
    reporter = Reporter(operator, jobs)
    frozen, _ = begin(jobs, kubelet, reporter, "frozen")
    _, token = begin(jobs, kubelet, reporter, "lively")

    with reporting(reporter, "lively", token), failing_twice(jobs, kubelet) as statuses:
        began = time.monotonic()
        if restarts:
            time.sleep(3)
            operator.kill()
            operator.start()
            began = time.monotonic()
        silent = jobs.wait("frozen", lambda status: status.get("reason") == "NotReporting", "silence", 30)["status"]
        assert time.monotonic() - began > SILENCE - 3  # times are whole seconds
        assert silent["phase"] == "Running"
        assert "Unless it reports, its pod is evicted at" in _message(silent, "Running")
        assert "NotReporting" in jobs.cluster.kubectl("get", "ftj", "frozen", "-n", jobs.namespace).stdout

        stalled = jobs.wait("frozen", lambda status: status.get("reason") == "Stalled", "it is given up", 15)["status"]
        assert stalled["attempts"][0]["reason"] == "Stalled"
        wait_for(lambda: kubelet.pods("frozen")[0].metadata.deletion_timestamp, "the pod is evicted")
        kubelet.end(frozen, 137)
        kubelet.remove(frozen)
        if restarts:
            assert kubelet.wait_for_pod("frozen", 1, 30).metadata.uid != frozen.metadata.uid
        assert jobs.get("lively")["status"]["reason"] == "Training"

    assert_restarted_once(jobs, kubelet, statuses)
    assert {"NotReporting", "Stalled"} <= set(jobs.event_reasons("frozen"))
    assert not {"NotReporting", "Stalled"} & set(jobs.event_reasons("lively"))
    assert not _is_over(jobs, "frozen"), "the eviction used up no retry, of which the job has none"


def begin(jobs: Any, kubelet: PlayedKubelet, reporter: Reporter, name: str) -> tuple[Any, str]:
    """Makes a job whose trainer runs and has reported once; returns its pod and the token for more reports."""
    jobs.create(name, stallTimeoutSeconds=10, maxRetries=0)
    pod = kubelet.wait_for_pod(name)
    kubelet.run(pod)
    token = reporter.own_token(pod, name)
    assert reporter.post(name, token, 1) == 202
    jobs.wait(name, lambda status: status.get("reason") == "Training", "it trains")
    return pod, token


def _message(status: Any, kind: str) -> str:
    return str(next(each["message"] for each in status["conditions"] if each["type"] == kind))
