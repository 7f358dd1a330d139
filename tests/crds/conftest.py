"""The generated CRD, installed on the real API server, and manifests to try on it."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_devcluster.cluster import DevCluster

CHECKOUT = Path(__file__).parents[2]
CRD = CHECKOUT / "crds/finetune.dev_finetunejobs.yaml"
MINIMAL: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "tried"},
    "spec": {
        "model": {"source": "hf://org/model"},
        "dataset": {"source": "s3://data/rows.jsonl"},
        "output": {"s3": {"bucket": "models"}},
    },
}


class JobsApi:
    """FineTuneJobs of one namespace, through kubectl's own strict validation."""

    def __init__(self, cluster: DevCluster, namespace: str) -> None:
        self._cluster = cluster
        self._where = ("-n", namespace)

    def apply(self, manifest: dict[str, Any], *, dry_run: bool = False) -> str:
        """Apply server-side; returns what was refused, empty where it was accepted."""
        options = ["--dry-run=server"] if dry_run else []
        done = self._cluster.kubectl(
            "apply", "--server-side", "-f", "-", *self._where, *options,
            stdin=yaml.safe_dump(manifest), check=False)  # fmt: skip
        assert "Warning" not in done.stderr
        return "" if done.returncode == 0 else done.stderr

    def get(self, name: str) -> dict[str, Any]:
        """The object as the API server has it."""
        # As JSON: PyYAML reads a float such as 1e-05 as text.
        job: dict[str, Any] = json.loads(self._cluster.kubectl("get", "ftj", name, "-o", "json", *self._where).stdout)
        return job


@pytest.fixture(scope="session")
def crd_cluster(dev_cluster: DevCluster) -> DevCluster:
    """The shared control plane with the CRD established."""
    applied = dev_cluster.kubectl("apply", "--server-side", "-f", str(CRD))
    assert "Warning" not in applied.stderr, applied.stderr
    dev_cluster.wait_for_definition()
    deadline = time.monotonic() + 20
    while "spec" not in dev_cluster.kubectl("explain", "finetunejob", check=False).stdout:
        assert time.monotonic() < deadline, "the CRD's schema was not published"
        time.sleep(0.1)
    return dev_cluster


@pytest.fixture
def jobs(crd_cluster: DevCluster, namespace: str) -> JobsApi:
    return JobsApi(crd_cluster, namespace)


@pytest.fixture
def minimal() -> dict[str, Any]:
    return copy.deepcopy(MINIMAL)
