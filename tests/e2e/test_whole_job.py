"""From `kubectl apply` to artifacts in S3, on real parts: the sample as it is shipped."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_devcluster.inputs import BUCKET, keys_below, read_json
from finetune_devcluster.platform import CHECKOUT, Platform
from finetune_test_programs.generation import generate

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]

FINISHED = {"Ready": "True", "Reconciling": "False", "Stalled": "False", "Succeeded": "True", "Running": "False"}


@pytest.fixture(scope="module")
def finished(platform: Platform, job_namespace: str) -> dict[str, Any]:
    job = yaml.safe_load((CHECKOUT / "crds/samples/cpu-tiny.yaml").read_text())
    job["metadata"]["namespace"] = job_namespace
    job["spec"]["output"]["s3"]["endpointURL"] = platform.store.endpoint_url
    platform.cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(job))
    name = job["metadata"]["name"]
    done = platform.wait_for_end(job_namespace, name, timeout=240)
    assert done["status"]["phase"] == "Succeeded", (done["status"], platform.trainer_log(job_namespace, name))
    return done


def test_status_tells_the_whole_story(finished: dict[str, Any]) -> None:
    status = finished["status"]
    conditions = {condition["type"]: condition["status"] for condition in status["conditions"]}
    assert FINISHED.items() <= conditions.items()
    assert all(c["observedGeneration"] == finished["metadata"]["generation"] for c in status["conditions"])
    assert status["progress"]["percent"] == 100
    assert status["progress"]["step"] == status["progress"]["totalSteps"] > 0
    assert 0 < status["progress"]["loss"] < 100
    assert [stage["name"] for stage in status["stages"]] == [
        "Preflight",
        "ModelLoading",
        "AdapterInjection",
        "DataFormatting",
        "TrainingConfiguration",
        "Training",
        "Saving",
        "Uploading",
    ]
    assert all(stage["endTime"] >= stage["startTime"] for stage in status["stages"])
    assert status["resolved"]["supervisedTokens"] > 0
    assert status["attempts"][0]["exitCode"] == 0


def test_what_preflight_found_is_in_the_status_and_in_the_bucket(platform: Platform, finished: dict[str, Any]) -> None:
    preflight, resolved = finished["status"]["preflight"], finished["status"]["resolved"]
    assert preflight["result"] == "Passed"
    assert preflight["rows"] == resolved["rows"] + resolved["evaluationRows"]
    assert (preflight["badRows"], preflight["errors"]) == (0, 0)
    assert 0 < preflight["tokens"]["p50"] <= preflight["tokens"]["p95"] <= preflight["tokens"]["max"]
    assert preflight["steps"] == finished["status"]["progress"]["totalSteps"]
    assert preflight["endTime"] <= finished["status"]["startTime"]
    key = preflight["reportUri"].removeprefix(f"s3://{BUCKET}/")
    page = platform.store.client().get_object(Bucket=BUCKET, Key=key)["Body"].read().decode()
    assert "Tokens per row" in page
    report = read_json(platform.store, preflight["reportUri"].replace("report.html", "report.json"))
    assert report["rows"]["total"] == preflight["rows"]


def test_status_lists_exactly_what_the_manifest_lists(platform: Platform, finished: dict[str, Any]) -> None:
    manifest = read_json(platform.store, finished["status"]["manifestUri"])
    listed = {(artifact["uri"], artifact["bytes"], artifact["sha256"]) for artifact in finished["status"]["artifacts"]}
    committed = {(artifact["uri"], artifact["bytes"], artifact["sha256"]) for artifact in manifest["artifacts"]}
    assert listed == committed
    kinds = {"Adapter", "Merged", "GGUF", "Modelfile", "ModelCard", "Configuration", "Metrics"}
    assert {artifact["type"] for artifact in finished["status"]["artifacts"]} == kinds


def test_every_byte_in_s3_has_the_digest_of_the_status(
    platform: Platform, finished: dict[str, Any], tmp_path: Path
) -> None:
    gguf = next(artifact for artifact in finished["status"]["artifacts"] if artifact["type"] == "GGUF")
    path = tmp_path / "model.gguf"
    platform.store.client().download_file(BUCKET, gguf["uri"].removeprefix(f"s3://{BUCKET}/"), str(path))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == gguf["sha256"]
    assert generate(path, [{"role": "user", "content": "Hello"}], tokens=8)


def test_no_secret_in_status_log_or_bucket(platform: Platform, finished: dict[str, Any]) -> None:
    secret = platform.store.secret_key
    s3 = platform.store.client()
    keys = [key for key in keys_below(platform.store, "") if key.endswith(".json")]
    texts = [s3.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode() for key in keys]
    metadata = finished["metadata"]
    (checks,) = platform.trainer_pods(metadata["namespace"], metadata["name"], "preflight")
    logs = [platform.trainer_log(metadata["namespace"], metadata["name"]), platform.pod_log(checks)]
    assert all(logs), "logs must be readable through the API server"
    texts += [str(finished), *logs]
    assert not [text for text in texts if secret in text]


def test_kubectl_get_shows_the_columns(platform: Platform, finished: dict[str, Any]) -> None:
    table = platform.cluster.kubectl("get", "ftj", "-n", finished["metadata"]["namespace"]).stdout
    header, row = table.splitlines()[:2]
    assert header.split() == ["NAME", "PHASE", "REASON", "PROGRESS", "LOSS", "ETA", "AGE"]
    assert "Succeeded" in row
    assert "100%" in row
