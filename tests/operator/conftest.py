"""The operator against a real control plane, on which the test plays the kubelet."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kubernetes import client

from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.operator_process import OperatorProcess
from finetune_devcluster.played_kubelet import PlayedKubelet, wait_for

Object = dict[str, Any]


@pytest.fixture(scope="session")
def operator(dev_cluster: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """One operator for all namespaces; a test that kills it starts it again."""
    process = OperatorProcess(dev_cluster, tmp_path_factory.mktemp("operator"))
    process.start()
    yield process
    process.stop()


@pytest.fixture
def kubelet(dev_cluster: DevCluster, namespace: str) -> PlayedKubelet:
    return PlayedKubelet(dev_cluster, namespace)


@pytest.fixture
def jobs(dev_cluster: DevCluster, namespace: str) -> "Jobs":
    return Jobs(dev_cluster, namespace)


class Jobs:
    """FineTuneJobs in the test's namespace."""

    def __init__(self, cluster: DevCluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self._api: Any = client.CustomObjectsApi(cluster.api_client())

    def create(self, name: str, **run_policy: Any) -> Object:
        """A small job; keyword arguments are fields of spec.runPolicy."""
        spec = {
            "model": {"source": "s3://models/tiny/"},
            "dataset": {"source": "s3://data/chat.jsonl"},
            "output": {"s3": {"bucket": "results"}},
            "resources": {"gpus": 0},
            "runPolicy": run_policy,
        }
        body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
        created: Object = self._api.create_namespaced_custom_object(*self._path(), body)
        return created

    def patch_run_policy(self, name: str, **fields: Any) -> None:
        """Change spec.runPolicy."""
        self._api.patch_namespaced_custom_object(*self._path(), name, {"spec": {"runPolicy": fields}})

    def get(self, name: str) -> Object:
        found: Object = self._api.get_namespaced_custom_object(*self._path(), name)
        return found

    def delete(self, name: str) -> None:
        self._api.delete_namespaced_custom_object(*self._path(), name)

    def wait(self, name: str, holds: Callable[[Object], Any], what: str, seconds: float = 15) -> Object:
        """The job, as soon as its status is as wanted."""

        def get() -> Object | None:
            job = self.get(name)
            return job if holds(job.get("status", {})) else None

        try:
            return wait_for(get, what, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; status: {self.get(name).get('status')}") from None

    def wait_for_phase(self, name: str, phase: str, seconds: float = 15) -> Object:
        return self.wait(name, lambda status: status.get("phase") == phase, phase, seconds)

    def _path(self) -> tuple[str, str, str, str]:
        return "finetune.dev", "v1alpha1", self.namespace, "finetunejobs"
