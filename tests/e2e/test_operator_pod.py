"""The operator's own pod, with the probes that the chart gives it."""

import re
import time
import urllib.request
from typing import Any

import pytest
from kubernetes import client

from finetune_devcluster.platform import SYSTEM_NAMESPACE, Platform
from finetune_operator.health import DEAD_AFTER_SECONDS
from finetune_operator.watch.controller import HEARTBEAT_SECONDS

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]

PROBE_SECONDS = 4 * 20 + 10
"""Time within which three probes fail, 20 s apart, and the kubelet has restarted the container."""


def operator_container(platform: Platform) -> tuple[Any, Any]:
    """The running pod's container: what the chart asks for, and how it is."""
    api = client.CoreV1Api(platform.cluster.api_client())
    (pod,) = [
        pod
        for pod in api.list_namespaced_pod(SYSTEM_NAMESPACE).items
        if pod.metadata.deletion_timestamp is None and pod.status.phase == "Running"
    ]
    (asked,), (found,) = pod.spec.containers, pod.status.container_statuses
    return asked, found


def test_the_worker_takes_its_heartbeat_where_the_kubelet_asks_for_it(platform: Platform) -> None:
    """The address of the probe says how old the heartbeat is: one that nobody took would be four times as old here."""
    asked, found = operator_container(platform)
    probe = asked.liveness_probe.http_get
    (port,) = [port.container_port for port in asked.ports if port.name == probe.port]
    ages = []
    for _ in range(4 * int(HEARTBEAT_SECONDS)):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{probe.path}", timeout=5) as answer:
            ages.append(float(re.fullmatch(r"heartbeat ([0-9.]+) s ago\n", answer.read().decode())[1]))  # type: ignore[index]
        time.sleep(1)
    assert max(ages) < 2 * HEARTBEAT_SECONDS
    assert operator_container(platform)[1].container_id == found.container_id


@pytest.mark.stalls
def test_the_kubelet_never_restarts_the_operator(platform: Platform) -> None:
    """For longer than the probes wait, from the container's start."""
    _, found = operator_container(platform)
    while time.time() < found.state.running.started_at.timestamp() + DEAD_AFTER_SECONDS + PROBE_SECONDS:
        time.sleep(1)
    _, later = operator_container(platform)
    assert (later.container_id, later.restart_count) == (found.container_id, found.restart_count)
