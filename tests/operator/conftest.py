"""The operator against a real control plane, on which the test plays the kubelet."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.jobs import Jobs, Outcomes
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

OPERATOR = pytest.StashKey[OperatorProcess]()


@pytest.fixture
def outcomes() -> Outcomes:
    return Outcomes()


@pytest.fixture(scope="session")
def operator_process(
    dev_cluster: DevCluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[OperatorProcess]:
    process = OperatorProcess(dev_cluster, tmp_path_factory.mktemp("operator"))
    process.start()
    request.session.stash[OPERATOR] = process
    yield process
    process.stop()


@pytest.fixture
def operator(operator_process: OperatorProcess) -> OperatorProcess:
    """One operator for all namespaces; a test that kills it starts it again."""
    if not operator_process.is_running:
        operator_process.start()
    return operator_process


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the operator behind the last test of this folder: it would work on the jobs of others, who write their
    status themselves."""
    process = item.session.stash.get(OPERATOR, None)
    if process is not None and nextitem is not None and not nextitem.path.is_relative_to(Path(__file__).parent):
        process.stop()


@pytest.fixture
def kubelet(dev_cluster: DevCluster, namespace: str) -> PlayedKubelet:
    return PlayedKubelet(dev_cluster, namespace)


@pytest.fixture
def jobs(dev_cluster: DevCluster, namespace: str) -> Iterator[Jobs]:
    jobs = Jobs(dev_cluster, namespace)
    yield jobs
    jobs.delete_all()
