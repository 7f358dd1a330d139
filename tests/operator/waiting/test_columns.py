"""What `kubectl get` shows of jobs that wait, are stuck, run and are over: phase and reason, side by side."""

from typing import Any

import pytest

from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster

SHOWN = {
    "checks-run": ("Validating", "Checking"),
    "runs": ("Running", "TrainerStarted"),
    "is-paused": ("Suspended", "Suspended"),
    "is-refused": ("Failed", "InvalidRow"),
    "no-cpu-for-the-checks": ("Validating", "Unschedulable"),
    "no-image": ("Queued", "ImagePullFailed"),
    "no-image-in-time": ("Failed", "ImagePullFailed"),
    "no-node": ("Queued", "Unschedulable"),
    "no-secret": ("Validating", "ContainerConfigError"),
    "succeeded": ("Succeeded", "Completed"),
}


def _table(jobs: Any) -> list[list[str]]:
    """Rows of `kubectl get`, split into cells; the first one is the header."""
    printed = jobs.cluster.kubectl("get", "ftj", "-n", jobs.namespace).stdout
    return [line.split() for line in printed.splitlines()]


def _make(jobs: Any, kubelet: PlayedKubelet, outcomes: Any) -> None:
    """Brings a job into each of the situations."""
    for name in ("runs", "no-image", "no-image-in-time", "no-node", "succeeded"):
        jobs.create(name)
    for name in ("checks-run", "is-refused", "no-cpu-for-the-checks", "no-secret"):
        jobs.create(name, preflight="Run")
    jobs.create("is-paused", suspend=True)

    kubelet.run(kubelet.wait_for_pod("runs"))
    for name in ("no-image", "no-image-in-time"):
        kubelet.wait_in(kubelet.wait_for_pod(name), "ImagePullBackOff", "not found")
    jobs.wait("no-image-in-time", lambda status: status.get("reason") == "ImagePullFailed", "the cause")
    jobs.patch_run_policy("no-image-in-time", startupDeadlineSeconds=1)

    trained = kubelet.wait_for_pod("succeeded")
    kubelet.run(trained)
    kubelet.end(trained, 0, outcomes.success.encode())

    kubelet.run(kubelet.wait_for_pod("checks-run", component="preflight"))
    refused = kubelet.wait_for_pod("is-refused", component="preflight")
    kubelet.run(refused)
    kubelet.end(refused, 11, outcomes.refused.encode())
    secret = kubelet.wait_for_pod("no-secret", component="preflight")
    kubelet.wait_in(secret, "CreateContainerConfigError", 'secret "s3" not found')


def test_a_stuck_job_is_seen_in_the_default_columns(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    _make(jobs, kubelet, outcomes)

    def shown() -> dict[str, tuple[str, ...]]:
        return {name: (phase, reason) for name, phase, reason, *_ in _table(jobs)[1:]}

    try:
        wait_for(lambda: shown() == SHOWN, "every situation", 30)
    except TimeoutError:
        assert shown() == SHOWN
    assert _table(jobs)[0] == ["NAME", "PHASE", "REASON", "PROGRESS", "LOSS", "ETA", "AGE"]
