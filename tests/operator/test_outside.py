"""The operator outside the cluster: it takes address and credentials from a kubeconfig, and does the same work."""

from collections.abc import Iterator
from typing import Any

import pytest

from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster


@pytest.fixture
def outside(operator: OperatorProcess) -> Iterator[OperatorProcess]:
    """The operator, started with a kubeconfig in place of its service account's files."""
    operator.kill()
    operator.start(outside=True)
    yield operator
    operator.kill()
    operator.start()


def test_a_job_runs_from_its_start_to_its_end(
    outside: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("remote")
    pod = kubelet.wait_for_pod("remote")
    kubelet.run(pod)
    jobs.wait_for_phase("remote", "Running")
    kubelet.end(pod, 0, outcomes.success.encode())
    jobs.wait_for_phase("remote", "Succeeded")
    assert "ERROR" not in outside.log
    assert "WARNING" not in outside.log
