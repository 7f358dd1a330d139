"""What `helm test` says of a whole installation, and of one that lacks something. tests/e2e runs it as helm does."""

from pathlib import Path

import pytest

from finetune_devcluster.cluster import DevCluster
from finetune_operator import installation_check
from finetune_operator.installation_check import check_installation
from finetune_operator.settings import Kubeconfig, Settings
from finetune_test_operator.operator_process import NAMESPACE, OperatorProcess
from finetune_test_programs.child_process import free_port

pytestmark = pytest.mark.cluster


def _settings(cluster: DevCluster, operator: OperatorProcess, **changes: str) -> Settings:
    environment = {
        "FINETUNE_TRAINER_IMAGE": "trainer:test",
        "FINETUNE_PROGRESS_URL": operator.progress_url,
        "FINETUNE_PROGRESS_PORT": str(operator.progress_port),
        "FINETUNE_HEALTH_PORT": str(operator.health_port),
        "FINETUNE_TLS_DIR": str(operator.tls_dir),
        "FINETUNE_LEASE_NAMESPACE": NAMESPACE,
    }
    return Settings.from_environment(environment | changes, Kubeconfig(cluster.kubeconfig, None))


async def test_a_whole_installation_passes(
    dev_cluster: DevCluster, operator: OperatorProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dev_cluster.kubectl("get", "ftj", "-A", "-o", "name").stdout
    assert await check_installation(_settings(dev_cluster, operator))
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["ok"] * 4
    assert dev_cluster.kubectl("get", "ftj", "-A", "-o", "name").stdout == before


async def test_what_is_missing_is_named(
    dev_cluster: DevCluster,
    operator: OperatorProcess,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(installation_check, "ATTEMPTS", 1)
    other = {"FINETUNE_LEASE_NAME": "nobodys", "FINETUNE_PROGRESS_URL": f"https://127.0.0.1:{free_port()}"}
    assert not await check_installation(_settings(dev_cluster, operator, **other))
    said = capsys.readouterr().out
    assert "FAILED  a replica of the operator leads: NotFoundError" in said
    assert "FAILED  the progress server answers over TLS" in said

    # A server whose authority trainers do not know is as good as none.
    assert not await check_installation(_settings(dev_cluster, operator, FINETUNE_TLS_DIR=str(tmp_path)))
    assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().out
