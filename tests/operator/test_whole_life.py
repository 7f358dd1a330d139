"""A job from apply to its end, on a real control plane with a played kubelet."""

from typing import Any

import pytest

from finetune_api.failures import ExitCode
from finetune_api.outcome import Outcome
from finetune_operator.desired.names import PREFLIGHT
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, fill_in

pytestmark = pytest.mark.cluster


def test_a_job_succeeds_with_its_artifacts(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("good", preflight="Run")
    checks = kubelet.wait_for_pod("good", component=PREFLIGHT)
    jobs.wait_for_phase("good", "Validating")
    kubelet.run(checks)
    kubelet.end(checks, 0, outcomes.checked.encode())

    pod = kubelet.wait_for_pod("good")
    jobs.wait_for_phase("good", "Queued")
    kubelet.run(pod)
    jobs.wait_for_phase("good", "Running")

    kubelet.end(pod, 0, outcomes.success.encode())
    status = jobs.wait_for_phase("good", "Succeeded")["status"]
    said = Outcome.decode(fill_in(outcomes.success.encode(), pod))
    assert status["resultLocation"] == f"s3://results/{pod.metadata.namespace}/good/"
    assert status["artifacts"] == [said.artifacts[0].to_wire()]
    assert status["manifestUri"] == said.manifest_uri
    assert status["progress"]["percent"] == 100
    assert status["attempts"][0]["exitCode"] == 0
    assert [stage["name"] for stage in status["stages"]] == ["Preflight"]
    assert status["preflight"]["reportUri"] == f"{status['resultLocation']}preflight/report.html"


def test_a_permanent_failure_arrives_with_reason_and_hint(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("bad")
    pod = kubelet.wait_for_pod("bad")
    kubelet.run(pod)
    kubelet.end(pod, ExitCode.DATA, outcomes.bad_row.encode())
    status = jobs.wait_for_phase("bad", "Failed", seconds=10)["status"]
    assert status["failure"]["reason"] == "InvalidRow"
    assert status["failure"]["message"] == outcomes.bad_row.message
    assert status["failure"]["exitCode"] == ExitCode.DATA
    assert "onBadRow" in status["failure"]["hint"]
    assert len(kubelet.pods("bad")) == 1
