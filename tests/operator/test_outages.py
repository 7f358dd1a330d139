"""The API server goes away, or takes rights away: the operator waits, says so, and goes on."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client

from finetune_test_operator.operator_process import ACCOUNT, OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet
from finetune_test_servers.tcp_proxy import TcpProxy

pytestmark = pytest.mark.cluster


@pytest.fixture
def proxy(operator: OperatorProcess) -> Iterator[TcpProxy]:
    """The operator talks to the API server through this."""
    operator.kill()
    with TcpProxy.start(operator.api_port) as running:
        operator.start(api_port=running.port)
        yield running
        operator.kill()
    operator.start()


def test_an_outage_of_the_api_server_is_waited_for(
    operator: OperatorProcess, proxy: TcpProxy, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("cut-off")
    pod = kubelet.wait_for_pod("cut-off")
    kubelet.run(pod)
    jobs.wait_for_phase("cut-off", "Running")

    before = operator.pid
    proxy.cut()
    kubelet.end(pod, 0, outcomes.success.encode())
    time.sleep(4)
    assert jobs.get("cut-off")["status"]["phase"] == "Running"

    proxy.mend()
    jobs.wait_for_phase("cut-off", "Succeeded", seconds=30)
    assert operator.pid == before
    assert operator.is_running


def test_a_right_that_is_missing_is_named_and_the_job_goes_on_when_it_is_back(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    rbac: Any = client.RbacAuthorizationV1Api(jobs.cluster.api_client())
    role = rbac.read_cluster_role(ACCOUNT)
    whole = list(role.rules)
    role.rules = [rule for rule in whole if rule.resources != ["configmaps"]]
    role.rules.append(client.V1PolicyRule(api_groups=[""], resources=["configmaps"], verbs=["get"]))
    rbac.replace_cluster_role(ACCOUNT, role)

    try:
        time.sleep(1)  # the authorizer's view of roles
        jobs.create("forbidden")
        status = jobs.wait("forbidden", lambda s: _stalled(s) == "PermissionDenied", "told")["status"]
    finally:
        role = rbac.read_cluster_role(ACCOUNT)
        role.rules = whole
        rbac.replace_cluster_role(ACCOUNT, role)

    message = next(each["message"] for each in status["conditions"] if each["type"] == "Stalled")
    assert "POST" in message
    assert "configmaps" in message
    jobs.label("forbidden", "try", "again")
    assert kubelet.wait_for_pod("forbidden")


def _stalled(status: dict[str, Any]) -> str:
    return next(
        (e["reason"] for e in status.get("conditions", []) if e["type"] == "Stalled" and e["status"] == "True"), ""
    )


def test_a_signal_stops_the_operator_quickly_and_cleanly(operator: OperatorProcess) -> None:
    began = time.monotonic()
    assert operator.stop() == 0
    assert time.monotonic() - began < 8
    operator.start()
