"""An operator that serves one namespace needs rights in that one only, and leaves the others alone."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster


@pytest.fixture
def scoped(
    operator: OperatorProcess, dev_cluster: DevCluster, namespace: str, tmp_path: Path
) -> Iterator[OperatorProcess]:
    """Serves the test's namespace, in place of the operator of all namespaces."""
    operator.kill()
    process = OperatorProcess(dev_cluster, tmp_path, namespace)
    process.start()
    yield process
    process.kill()
    operator.start()


def test_its_own_namespace_is_served(scoped: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any) -> None:
    jobs.create("inside")
    pod = kubelet.wait_for_pod("inside")
    kubelet.run(pod)
    jobs.wait_for_phase("inside", "Running")
    kubelet.end(pod, 0, outcomes.success.encode())
    jobs.wait_for_phase("inside", "Succeeded")
    assert "ERROR" not in scoped.log
    assert "WARNING" not in scoped.log


def test_other_namespaces_are_left_alone(scoped: OperatorProcess, dev_cluster: DevCluster, jobs: Any) -> None:
    elsewhere = type(jobs)(dev_cluster, "default")
    elsewhere.create("outside")
    jobs.create("inside")
    jobs.wait_for_phase("inside", "Queued")
    time.sleep(1)
    assert "status" not in elsewhere.get("outside")
    elsewhere.delete("outside")
