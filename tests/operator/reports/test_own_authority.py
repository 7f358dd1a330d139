"""Two replicas that make their certificates themselves: a trainer reports to both, also after both have restarted."""

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.progress import progress_path
from finetune_devcluster.cluster import DevCluster
from finetune_operator.cluster.access import AUTHORITY_NAME
from finetune_test_operator.operator_process import NAMESPACE, OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet
from finetune_test_operator.reporter import Reporter

pytestmark = pytest.mark.cluster


@pytest.fixture
def replicas(
    dev_cluster: DevCluster, operator_process: OperatorProcess, tmp_path: Path
) -> Iterator[tuple[OperatorProcess, OperatorProcess]]:
    """A leader and a follower with one seed, in place of the operator of all tests."""
    operator_process.kill()
    (tmp_path / "token").write_text("a token that the kubelet mounts into every replica")
    first = OperatorProcess(dev_cluster, tmp_path / "first")
    second = OperatorProcess(dev_cluster, tmp_path / "second", beside=first)
    for name, replica in (("first", first), ("second", second)):
        replica.environment |= {
            "FINETUNE_TLS_SEED": str(tmp_path / "token"),
            "FINETUNE_TLS_DIR": str(tmp_path / name / "memory"),
            "FINETUNE_AUTHORITY_CONFIG_MAP": AUTHORITY_NAME,
        }
    empty = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": AUTHORITY_NAME, "namespace": NAMESPACE}}
    dev_cluster.kubectl("create", "-f", "-", stdin=json.dumps(empty))  # as the chart makes it
    first.start()
    second.start(follows=True)
    yield first, second
    first.kill()
    second.kill()
    dev_cluster.kubectl("delete", "configmap", "-n", NAMESPACE, AUTHORITY_NAME)


class Trainer:
    """A trainer that has read its ConfigMap once, at its start."""

    def __init__(self, jobs: Any, name: str, token: str) -> None:
        (config_map,) = jobs.config_maps(name)
        authority = yaml.safe_load(config_map.data["run_config.yaml"])["progress"]["caCertificate"]
        self.authority = str(authority)
        self._tls = ssl.create_default_context(cadata=authority)
        self._path = progress_path(jobs.namespace, name)
        self._token = token

    def post(self, replica: OperatorProcess) -> int:
        """Post nothing to a replica; returns the status of its answer (422: it is no report, but it was understood)."""
        headers = {"Authorization": f"Bearer {self._token}"}
        request = urllib.request.Request(replica.progress_url + self._path, b"{}", headers, method="POST")
        try:
            with urllib.request.urlopen(request, context=self._tls, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code


def _published(cluster: DevCluster) -> str:
    """Returns what the ConfigMap shows, once something stands in it."""
    name = ("-n", NAMESPACE, f"configmap/{AUTHORITY_NAME}")
    cluster.kubectl("wait", *name, "--for=jsonpath={.data}", "--timeout=20s")
    return cluster.kubectl("get", *name, "-o", r"jsonpath={.data.ca\.crt}").stdout


def test_a_running_trainer_trusts_every_replica_also_after_all_have_restarted(
    replicas: tuple[OperatorProcess, OperatorProcess], jobs: Any, kubelet: PlayedKubelet, tmp_path: Path
) -> None:
    first, second = replicas
    jobs.create("trusting")
    pod = kubelet.wait_for_pod("trusting")
    kubelet.run(pod)
    trainer = Trainer(jobs, "trusting", Reporter(first, jobs).own_token(pod, "trusting"))
    assert [trainer.post(replica) for replica in replicas] == [422, 422], "the follower passes it on to the leader"

    for replica in replicas:
        replica.kill()
    second.start()
    first.start(follows=True)
    assert [trainer.post(replica) for replica in replicas] == [422, 422]
    assert trainer.authority == _published(jobs.cluster), "Prometheus trusts whom trainers trust"
    assert "certificate changed" not in str(jobs.get("trusting")["status"]["conditions"])

    # Another seed is another authority, which no running trainer trusts: the process ends, and tells later jobs.
    (tmp_path / "token").write_text("a token of another account, as after its deletion")
    for replica in (first, second):
        assert replica.wait() == 0
    second.start()
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        trainer.post(second)
