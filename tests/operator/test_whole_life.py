"""A job from apply to its end, on a real control plane with a played kubelet."""

from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Artifact, Outcome, Result
from finetune_api.vocabulary import ArtifactType, Stage
from finetune_devcluster.operator_process import OperatorProcess
from finetune_devcluster.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster

ARTIFACT = Artifact(
    type=ArtifactType.ADAPTER, uri="s3://results/x/adapter/", bytes=12, sha256="a" * 64, format="safetensors"
)
NOW = datetime(2026, 11, 24, tzinfo=UTC)
SUCCESS = Outcome(
    result=Result.SUCCEEDED,
    stage=Stage.UPLOADING,
    step=20,
    total_steps=20,
    loss=1.5,
    manifest_uri="s3://results/x/manifest.json",
    artifacts=(ARTIFACT,),
    finished=NOW,
)
BAD_ROW = Outcome(
    result=Result.FAILED,
    reason=FailureReason.INVALID_ROW,
    message="line 2: messages is not a list",
    exit_code=ExitCode.DATA,
    stage=Stage.DATA_FORMATTING,
    finished=NOW,
)


def test_a_job_succeeds_with_its_artifacts(operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet) -> None:
    jobs.create("good")
    pod = kubelet.wait_for_pod("good")
    jobs.wait_for_phase("good", "Queued")
    kubelet.run(pod)
    jobs.wait_for_phase("good", "Running")
    kubelet.end(pod, 0, SUCCESS.encode())
    status = jobs.wait_for_phase("good", "Succeeded")["status"]
    assert status["artifacts"] == [ARTIFACT.to_wire()]
    assert status["manifestUri"] == SUCCESS.manifest_uri
    assert status["progress"]["percent"] == 100
    assert status["attempts"][0]["exitCode"] == 0


def test_a_permanent_failure_arrives_with_reason_and_hint(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    jobs.create("bad")
    pod = kubelet.wait_for_pod("bad")
    kubelet.run(pod)
    kubelet.end(pod, ExitCode.DATA, BAD_ROW.encode())
    status = jobs.wait_for_phase("bad", "Failed", seconds=10)["status"]
    assert status["failure"]["reason"] == "InvalidRow"
    assert status["failure"]["message"] == BAD_ROW.message
    assert status["failure"]["exitCode"] == ExitCode.DATA
    assert "onBadRow" in status["failure"]["hint"]
    assert len(kubelet.pods("bad")) == 1
