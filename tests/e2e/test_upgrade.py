"""From the release before to this one, back and forth again, while a job trains; then away with all of it.

The release before is its chart's package, as it was published (`tests/charts/previous`). Its image is not at hand: the
node runs this checkout's operator for both, under the role, the environment and the CRD that each chart gives it.
"""

from typing import Any

import pytest
import yaml

from finetune_devcluster.platform import CHECKOUT, SYSTEM_NAMESPACE, Platform
from finetune_test_programs.child_process import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]
(PREVIOUS,) = (CHECKOUT / "tests/charts/previous").glob("*.tgz")
NAMESPACE, NAME = "upgraded", "lasting"
OLD_SECRET = "finetune-operator-tls"
DEFINITION = "customresourcedefinition/finetunejobs.finetune.dev"


class Witness:
    """The running trainer's pod, as it was before anything was upgraded."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        (pod,) = platform.trainer_pods(NAMESPACE, NAME)
        self._seen = self._look(pod)

    def confirm(self, *, reports: bool = True) -> None:
        """The pod is the same and runs on; with `reports`, what it reports from now on is shown."""
        (pod,) = self._platform.trainer_pods(NAMESPACE, NAME)
        assert self._look(pod) == self._seen
        assert pod.status.phase == "Running"
        if reports:
            step = self._step(self._platform.job(NAMESPACE, NAME))
            later: dict[str, Any] = {"timeout": 90.0, "what": f"beyond step {step}"}
            self._platform.wait_for(NAMESPACE, NAME, lambda job: self._step(job) > step, **later)

    @staticmethod
    def _step(job: dict[str, Any]) -> int:
        return int(job["status"].get("progress", {}).get("step", 0))

    @staticmethod
    def _look(pod: Any) -> tuple[Any, ...]:
        (container,) = pod.status.container_statuses
        return pod.metadata.uid, pod.spec.to_dict(), container.restart_count, container.container_id


def _schema(platform: Platform) -> Any:
    found = platform.cluster.kubectl("get", DEFINITION, "-o", "yaml").stdout
    return yaml.safe_load(found)["spec"]["versions"][0]["schema"]


def test_a_running_job_goes_through_upgrade_and_return(platform: Platform, small_job: Any) -> None:
    port = free_port()
    address = {"progress.port": str(port), "progress.url": f"https://127.0.0.1:{port}", "health.port": str(free_port())}
    where = ("--namespace", SYSTEM_NAMESPACE)
    newer = _schema(platform)
    try:
        platform.cluster.helm("uninstall", "finetune-operator", *where, "--wait")
        platform.install_operator(PREVIOUS, **address)
        older = _schema(platform)
        assert older != newer, "tests/charts/previous has this version's CRD: it proves nothing"

        platform.create_namespace(NAMESPACE)
        job = small_job(NAME, training={"maxSteps": 5000, "batchSize": 1, "gradientAccumulation": 1})
        job["metadata"]["namespace"] = NAMESPACE
        platform.apply(job)
        training: dict[str, Any] = {"timeout": 120.0, "what": "training"}
        platform.wait_for(
            NAMESPACE, NAME, lambda job: job.get("status", {}).get("progress", {}).get("step"), **training
        )
        witness = Witness(platform)

        # This version has another authority, so the trainer's progress is hidden, and it trains on.
        platform.install_operator(**address)
        assert _schema(platform) == newer
        witness.confirm(reports=False)
        platform.cluster.helm("rollback", "finetune-operator", *where, "--wait")
        assert _schema(platform) == older
        witness.confirm()

        # As the runbook says: the Secret that the older chart made is kept, so that nothing is hidden.
        kept = ("annotate", "secret", OLD_SECRET, "helm.sh/resource-policy=keep")
        platform.cluster.kubectl(*kept, "-n", SYSTEM_NAMESPACE)
        platform.install_operator(**address, **{"tls.secretName": OLD_SECRET})
        assert _schema(platform) == newer
        witness.confirm()

        platform.cluster.helm("uninstall", "finetune-operator", *where, "--wait")
        witness.confirm(reports=False)
        platform.cluster.kubectl("delete", "namespace", NAMESPACE, "--timeout=120s")
        left = platform.cluster.kubectl("get", "namespace", NAMESPACE, "--ignore-not-found", "-o", "name").stdout
        assert left == ""
    finally:
        platform.install_operator()
