"""The proxy does what a plan says, once, to the request that the plan names: here to lists of pods, on a real API
server."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPSConnection
from typing import Any, NamedTuple

import pytest
from kubernetes import client

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.faults.fault_proxy import FaultProxy
from finetune_test_operator.faults.plans import Plan
from finetune_test_operator.operator_process import OperatorProcess

pytestmark = pytest.mark.cluster

JOB = "life-0001"


class Answer(NamedTuple):
    """What the proxy answers to a list of pods."""

    status: int
    retry_after: str | None
    pods: set[str]


Ask = Callable[[], Answer]


@pytest.fixture
def proxy(dev_cluster: DevCluster) -> Iterator[FaultProxy]:
    with FaultProxy.start(dev_cluster) as started:
        yield started


@pytest.fixture
def ask(operator_process: OperatorProcess, proxy: FaultProxy, namespace: str) -> Ask:
    """Lists the job's pods through the proxy, with the operator's rights."""
    token = (operator_process.service_account.folder / "token").read_text()
    path = f"/api/v1/namespaces/{namespace}/pods?labelSelector=finetune.dev%2Fjob-name%3D{JOB}"
    trust = operator_process.tls()

    def list_pods() -> Answer:
        connection = HTTPSConnection("127.0.0.1", proxy.port, context=trust, timeout=10)
        with closing(connection):
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
            answer = connection.getresponse()
            found = json.load(answer)
        names = {pod["metadata"]["name"] for pod in found.get("items", ())}
        return Answer(answer.status, answer.headers.get("Retry-After"), names)

    return list_pods


@pytest.fixture
def make_pod(dev_cluster: DevCluster, namespace: str) -> Callable[[str], None]:
    core: Any = client.CoreV1Api(dev_cluster.api_client())

    def make(name: str) -> None:
        metadata = {"name": name, "labels": {"finetune.dev/job-name": JOB}}
        core.create_namespaced_pod(
            namespace, {"metadata": metadata, "spec": {"containers": [{"name": "a", "image": "a"}]}}
        )

    return make


def test_a_stale_list_is_the_one_before(ask: Ask, proxy: FaultProxy, make_pod: Callable[[str], None]) -> None:
    proxy.courses[JOB].plan = Plan("passes", "stale", "LIST pods", 3)
    make_pod("first")
    assert ask().pods == {"first"}
    make_pod("second")
    assert ask().pods == {"first", "second"}
    make_pod("third")
    assert ask().pods == {"first", "second"}
    assert ask().pods == {"first", "second", "third"}


@pytest.mark.parametrize("code", [403, 429, 500, 503])
def test_a_refusal_comes_once(ask: Ask, proxy: FaultProxy, code: int) -> None:
    proxy.courses[JOB].plan = Plan("passes", str(code), "LIST pods", 1)
    assert ask() == (code, "1" if code == 429 else None, set())
    assert ask().status == 200


def test_a_reset_ends_the_connection(ask: Ask, proxy: FaultProxy) -> None:
    proxy.courses[JOB].plan = Plan("passes", "reset", "LIST pods", 1)
    with pytest.raises(ConnectionError):
        ask()
    assert ask().status == 200
    assert proxy.courses[JOB].places == ["LIST pods", "LIST pods"]
