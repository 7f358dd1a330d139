"""A job on several nodes in a queue of the real Kueue. `make kueue` runs it."""

import time
from typing import Any

import pytest

from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.kueue import Kueue, cluster_queue
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = [pytest.mark.kueue, pytest.mark.cluster]
NAMESPACE = "team-a"
ADMISSION_SECONDS = 3  # Kueue admits within one


def test_the_pods_of_two_nodes_are_admitted_together_or_not_at_all(
    queue_operator: OperatorProcess, kueue_cluster: DevCluster, kueue: Kueue, make_queued: Any, outcomes: Any
) -> None:
    queued, kubelet = make_queued(kueue_cluster, NAMESPACE), PlayedKubelet(kueue_cluster, NAMESPACE)
    queued.create_local_queue()

    # The quota has room for one pod of the two.
    queued.create("gang", nodes=2)
    queued.wait_for_message("gang", "insufficient", 20)
    (pod_set,) = queued.workload("gang")["spec"]["podSets"]
    assert pod_set["count"] == 2
    time.sleep(ADMISSION_SECONDS)
    assert not kubelet.pods("gang")
    assert queued.jobs.get("gang")["status"]["phase"] == "Queued"

    kueue.apply(cluster_queue(pods=2))
    pods = wait_for(lambda: found if len(found := kubelet.pods("gang")) == 2 else None, "both pods", 30)
    for pod in pods:
        kubelet.run(pod)
    queued.jobs.wait_for_phase("gang", "Running")
    kubelet.end(min(pods, key=lambda pod: pod.spec.hostname), 0, outcomes.success.encode())
    queued.jobs.wait_for_phase("gang", "Succeeded")
