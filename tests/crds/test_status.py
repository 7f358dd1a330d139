"""The status as the API server stores it, and what `kubectl get` shows of it."""

import json
from typing import Any

import pytest

from finetune_api.job import FineTuneJob
from finetune_api.status import FineTuneJobStatus
from finetune_devcluster.cluster import DevCluster

pytestmark = pytest.mark.cluster
NOW = "2026-01-02T03:04:05Z"
ATTEMPT = {
    "pod": "p",
    "uid": "u",
    "startTime": NOW,
    "endTime": NOW,
    "heldSeconds": 7200,
    "pricePerGpuHour": 2.75,
    "currency": "EUR",
    "energyJoules": 4440600,
}
STATUS: dict[str, Any] = {
    "observedGeneration": 1,
    "phase": "Uploading",
    "reason": "Uploading",
    "conditions": [
        {
            "type": "Running",
            "status": "True",
            "reason": "TrainerRunning",
            "message": "the trainer runs",
            "lastTransitionTime": NOW,
            "observedGeneration": 1,
        }
    ],
    "preflight": {
        "errors": 0,
        "rows": 1050,
        "badRows": 1,
        "duplicateRows": 3,
        "tokens": {"p50": 100, "p95": 900, "max": 2**53 - 1},
        "truncatedShare": 0.125,
        "supervisedShare": 1,
        "steps": 240,
        "gpu": "NVIDIA-H200",
        "gpuMemoryBytes": 33 * 10**9,
        "smallestGpuMemoryBytes": 7 * 10**9,
        "gpuHours": 1.5,
        "warnings": ["spec.dataset.source: 3 of 1050 rows repeat an earlier row"],
        "warningCount": 1,
        "reportUri": "s3://models/x/preflight/report.html",
        "result": "Passed",
        "jobName": "tried-12345-preflight",
        "startTime": NOW,
        "endTime": NOW,
        "attempts": [ATTEMPT | {"exitCode": 0, "reason": "Succeeded"}],
    },
    "progress": {
        "step": 120,
        "totalSteps": 240,
        "epoch": 0.5,
        "percent": 45,
        "completion": "45%",
        "etaSeconds": 750,
        "eta": "12m30s",
        "loss": 1.25,
        "evalLoss": 2,
        "bestStep": 80,
        "bestEvalLoss": 1.75,
        "stoppedEarly": True,
        "learningRate": 1e-5,
        "tokensPerSecond": 6235.5,
        "tokensPerSecondPerGpu": 6235.5,
        "trainedTokens": 2**53 - 1,
        "gpuMemoryBytes": 10**11,
        "uploadedBytes": 0,
        "uploadTotalBytes": 1,
        "uploadBytesPerSecond": 1.5e9,
        "lastReportTime": NOW,
        "sequence": 7,
    },
    "stages": [{"name": "Training", "startTime": NOW, "endTime": NOW}, {"name": "Uploading", "startTime": NOW}],
    "resolved": {
        "modelRevision": "0" * 40,
        "architecture": "LlamaForCausalLM",
        "datasetDigest": "1" * 64,
        "datasetFormat": "Messages",
        "rows": 1000,
        "skippedRows": 0,
        "evaluationRows": 50,
        "evaluationDigest": "2" * 64,
        "supervisedTokens": 10**6,
        "precision": "FP8",
        "precisionReason": "FP8 changes the loss of the first batch by 0.03%; up to 1% is accepted",
        "device": "NVIDIA H200",
        "batchSize": 8,
        "gradientAccumulation": 1,
        "batching": "Padded",
        "batchingReason": "GptOssForCausalLM cannot pack documents; 3.1% of the tokens computed are padding",
        "paddingShare": 0.031,
        "totalSteps": 240,
        "trainableParameters": 10**7,
        "totalParameters": 8 * 10**9,
        "adaptedShare": 1.0,
        "worldSize": 2,
        "slowestRankShare": 0.51,
        "quantizedShare": 0.982,
        "parallelism": "Sharded",
        "baseBytesPerProcess": 2 * 10**9,
        "newTokens": 3,
        "embeddingRows": 128259,
        "expertRank": 2,
    },
    "memory": {
        "mode": "Balanced",
        "predictedPeakBytes": 3 * 10**10,
        "measuredPeakBytes": 31 * 10**9,
        "microBatch": 8,
        "streamedLayers": 42,
        "fallbacks": [{"step": 12, "fromMode": "Fastest", "toMode": "Balanced"}],
    },
    "attempts": [ATTEMPT | {"exitCode": 20, "reason": "HubUnavailable"}],
    "usage": {
        "gpuSeconds": 7200,
        "gpuHours": 2,
        "waitingSeconds": 60,
        "currency": "EUR",
        "cost": 5.5,
        "estimatedGpuSeconds": 6000,
        "estimatedCost": 4.6,
        "estimateErrorPercent": 20,
        "earlierHeldSeconds": 600,
        "earlierCost": 0.5,
        "energyWattHours": 1234.5,
        "energyMeasuredGpuSeconds": 7200,
        "earlierEnergyJoules": 3600,
        "earlierMeasuredSeconds": 60,
    },
    "retries": 1,
    "checkpointStep": 100,
    "resumedFromStep": 100,
    "artifacts": [
        {
            "type": "GGUF",
            "uri": "s3://models/x/gguf/model-Q8_0.gguf",
            "bytes": 8 * 10**9,
            "sha256": "a" * 64,
            "format": "gguf",
            "quantization": "Q8_0",
            "loss": 1.1,
            "improvementKept": 0.95,
        }
    ],
    "judgement": {
        "data": "Evaluation",
        "rows": 40,
        "tokens": 9000,
        "baseLoss": 3.0,
        "adapterLoss": 1.0,
        "mergedLoss": 1.0,
        "warnings": ["Q2_K keeps 40 %"],
    },
    "resultLocation": "s3://models/x/",
    "manifestUri": "s3://models/x/manifest.json",
    "hubUrl": "https://huggingface.co/acme/x/commit/0",
    "reused": False,
    "failure": {
        "reason": "DiskFull",
        "message": "m",
        "hint": "h",
        "exitCode": 16,
        "stage": "Saving",
        "step": 240,
    },
    "jobName": "tried-12345",
    "startTime": NOW,
    "completionTime": NOW,
    "activeSeconds": 60,
}


@pytest.fixture
def stored(jobs: Any, minimal: dict[str, Any], crd_cluster: DevCluster, namespace: str) -> str:
    """A job with the status above; its namespace."""
    assert jobs.apply(minimal) == ""
    patched = patch_status(crd_cluster, namespace, STATUS)
    assert patched.returncode == 0, patched.stderr
    assert "Warning" not in patched.stderr
    return namespace


def patch_status(cluster: DevCluster, namespace: str, status: dict[str, Any]) -> Any:
    patch = json.dumps({"status": status})
    return cluster.kubectl(
        "patch", "ftj", "tried", "-n", namespace, "--subresource=status", "--type=merge", "-p", patch, check=False
    )


def test_the_example_sets_every_field() -> None:
    unset = []

    def walk(path: str, model: Any) -> None:
        for name in type(model).model_fields:
            value = getattr(model, name)
            if value is None and f"{path}.{name}" != "status.stages.end_time":
                unset.append(f"{path}.{name}")
            for entry in value if isinstance(value, tuple) else (value,):
                if hasattr(type(entry), "model_fields"):
                    walk(f"{path}.{name}", entry)

    walk("status", FineTuneJobStatus.model_validate(STATUS))
    assert not unset


def test_the_server_keeps_every_field_of_the_status(jobs: Any, stored: str) -> None:
    body = jobs.get("tried")
    assert body["status"] == STATUS
    assert FineTuneJob.from_object(body).status == FineTuneJobStatus.model_validate(STATUS)


@pytest.mark.parametrize(
    ("status", "found"),
    [
        ({"phase": "Sleeping"}, "status.phase"),
        ({"progress": {"percent": 101}}, "status.progress.percent"),
        ({"stages": [{"name": "Training", "startTime": NOW}] * 2}, "Duplicate value"),
    ],
    ids=["an unknown phase", "more than everything", "a stage twice"],
)
def test_a_wrong_status_is_refused(crd_cluster: DevCluster, stored: str, status: dict[str, Any], found: str) -> None:
    assert found in patch_status(crd_cluster, stored, status).stderr


def test_the_status_changes_through_its_own_door_only(jobs: Any, minimal: dict[str, Any], stored: str) -> None:
    assert jobs.apply(minimal | {"status": {"phase": "Failed"}}) == ""
    assert jobs.get("tried")["status"]["phase"] == "Uploading"


def test_kubectl_get_shows_the_run_in_columns(crd_cluster: DevCluster, stored: str) -> None:
    header, row = crd_cluster.kubectl("get", "ftj", "-n", stored).stdout.splitlines()
    assert header.split() == ["NAME", "PHASE", "REASON", "PROGRESS", "LOSS", "ETA", "AGE"]
    assert row.split()[:6] == ["tried", "Uploading", "Uploading", "45%", "1.25", "12m30s"]
    header, row = crd_cluster.kubectl("get", "ftj", "-n", stored, "-o", "wide").stdout.splitlines()
    assert header.split()[7:] == ["MODEL", "QUEUE", "STEP", "STEPS", "RETRIES", "GPU-HOURS", "COST", "ARTIFACTS"]
    assert row.split()[7:] == ["hf://org/model", "120", "240", "1", "2", "5.5", "s3://models/x/manifest.json"]
