"""Where the operator acts: in the namespaces that it is given, with rights in those only, or in all but the denied."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster


@pytest.fixture
def second(dev_cluster: DevCluster, namespace: str) -> Iterator[str]:
    """Another namespace that is served."""
    core: Any = client.CoreV1Api(dev_cluster.api_client())
    name = f"{namespace}-second"
    core.create_namespace({"metadata": {"name": name}})
    yield name
    core.delete_namespace(name)


@pytest.fixture
def scoped(
    operator: OperatorProcess, dev_cluster: DevCluster, namespace: str, second: str, tmp_path: Path
) -> Iterator[OperatorProcess]:
    """Serves the test's namespace and a second one, in place of the operator of all namespaces."""
    operator.kill()
    process = OperatorProcess(dev_cluster, tmp_path, namespace, second)
    process.start()
    yield process
    process.kill()
    operator.start()


def test_each_namespace_of_the_list_is_served(
    scoped: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any, dev_cluster: DevCluster, second: str
) -> None:
    jobs.create("inside")
    others = type(jobs)(dev_cluster, second)
    others.create("inside")
    pod = kubelet.wait_for_pod("inside")
    kubelet.run(pod)
    jobs.wait_for_phase("inside", "Running")
    kubelet.end(pod, 0, outcomes.success.encode())
    jobs.wait_for_phase("inside", "Succeeded")
    others.wait_for_phase("inside", "Queued")
    others.patch_run_policy("inside", suspend=True)
    others.wait_for_phase("inside", "Suspended")
    assert "ERROR" not in scoped.log
    assert "WARNING" not in scoped.log


def test_other_namespaces_are_left_alone(scoped: OperatorProcess, dev_cluster: DevCluster, jobs: Any) -> None:
    elsewhere = type(jobs)(dev_cluster, "default")
    elsewhere.create("outside")
    jobs.create("inside")
    jobs.wait_for_phase("inside", "Queued")
    time.sleep(1)
    assert elsewhere.get("outside")["status"] == {"observedGeneration": -1}
    elsewhere.delete("outside")


def test_nothing_is_made_in_a_namespace_of_the_system(
    operator: OperatorProcess, dev_cluster: DevCluster, jobs: Any
) -> None:
    there = type(jobs)(dev_cluster, "kube-system")
    there.create("intruder")
    status = there.wait("intruder", lambda status: status.get("reason") == "NamespaceDenied", "a refusal")["status"]
    (stalled,) = (condition for condition in status["conditions"] if condition["type"] == "Stalled")
    assert (status["phase"], stalled["status"]) == ("Pending", "True")
    assert "create the job in a namespace of your own" in stalled["message"]

    assert there.find_child("intruder") is None
    assert there.config_maps("intruder") == []
    there.delete("intruder")
