"""The operator's own pod, with the probes that the chart gives it, for longer than they wait."""

import time

import pytest
from kubernetes import client

from finetune_devcluster.platform import SYSTEM_NAMESPACE, Platform
from finetune_operator.health import DEAD_AFTER_SECONDS

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]

PROBE_SECONDS = 4 * 20 + 10
"""Time within which three probes fail, 20 s apart, and the kubelet has restarted the container."""


def test_the_kubelet_never_restarts_the_operator(platform: Platform) -> None:
    api = client.CoreV1Api(platform.cluster.api_client())

    def operator_container() -> tuple[object, int, float]:
        (pod,) = [
            pod
            for pod in api.list_namespaced_pod(SYSTEM_NAMESPACE).items
            if pod.metadata.deletion_timestamp is None and pod.status.phase == "Running"
        ]
        (container,) = pod.status.container_statuses
        return pod.metadata.uid, container.restart_count, container.state.running.started_at.timestamp()

    uid, restarts, started = operator_container()
    while time.time() < started + DEAD_AFTER_SECONDS + PROBE_SECONDS:
        time.sleep(1)
    assert operator_container() == (uid, restarts, started)
