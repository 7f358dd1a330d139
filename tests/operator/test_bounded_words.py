"""A pod says more than a status can hold, on a real API server: the job ends, and its status stays small."""

import json
import zlib
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api.outcome import COMPRESSED_PREFIX
from finetune_api.status import MAX_STATUS_BYTES
from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.operator_process import CHECKOUT, OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster
CRD = "finetunejobs.finetune.dev"
LIMIT_PATH = "/spec/versions/0/schema/openAPIV3Schema/properties/status/properties/checkpointStep/maximum"


def packed(**fields: Any) -> str:
    """A compressed outcome, as a forger would write it."""
    text = json.dumps({"result": "Failed", "reason": "InvalidRow", "finished": "2026-11-24T00:00:00Z"} | fields)
    return COMPRESSED_PREFIX + b64encode(zlib.compress(text.encode(), 9)).decode()


@pytest.mark.parametrize(
    ("outcome", "found"),
    [(packed(message="x" * 10**6), "40960 bytes"), (packed(step=10**30), "step: ")],
    ids=["a megabyte", "a huge step"],
)
def test_a_result_out_of_bounds_fails_the_job(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcome: str, found: str
) -> None:
    jobs.create("loud")
    pod = kubelet.wait_for_pod("loud")
    kubelet.run(pod)
    kubelet.end(pod, 11, outcome)

    status = jobs.wait_for_phase("loud", "Failed")["status"]
    assert status["failure"]["reason"] == "UntrustedResult"
    assert found in status["failure"]["message"]
    assert len(json.dumps(status)) < MAX_STATUS_BYTES


@pytest.fixture
def strict_crd(operator: OperatorProcess, dev_cluster: DevCluster) -> Iterator[None]:
    """A CRD that takes no checkpointStep beyond 5, as if an administrator had changed it."""
    patch = [{"op": "replace", "path": LIMIT_PATH, "value": 5}]
    dev_cluster.kubectl("patch", "crd", CRD, "--type=json", "-p", json.dumps(patch))
    yield
    path = CHECKOUT / "crds/finetune.dev_finetunejobs.yaml"
    dev_cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(path))


def test_a_status_that_is_refused_is_written_without_what_pods_said(
    strict_crd: None, dev_cluster: DevCluster, jobs: Any, kubelet: PlayedKubelet
) -> None:
    jobs.create("refused")
    pod = kubelet.wait_for_pod("refused")
    kubelet.run(pod)
    patch = json.dumps({"status": {"checkpointStep": 6}})
    where = (
        "patch",
        "ftj",
        "refused",
        "-n",
        jobs.namespace,
        "--subresource=status",
        "--type=merge",
        "--dry-run=server",
    )
    wait_for(lambda: dev_cluster.kubectl(*where, "-p", patch, check=False).returncode, "the schema is in force")
    kubelet.end(pod, 11, packed(message="line 2", checkpointStep=20))

    status = jobs.wait_for_phase("refused", "Failed")["status"]
    assert status["failure"]["reason"] == "InvalidRow"
    assert "checkpointStep" not in status
    ready = next(each for each in status["conditions"] if each["type"] == "Ready")
    assert "status.checkpointStep" in ready["message"]
