"""Samples, defaults, immutability and `kubectl explain`, as the API server gives them."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.definition import custom_resource_definition
from finetune_api.job import FineTuneJob, load_manifest
from finetune_devcluster.cluster import DevCluster
from finetune_operator.desired.preflight_job import build_preflight_job
from finetune_operator.desired.trainer_job import build_trainer_job

pytestmark = pytest.mark.cluster
SAMPLES = sorted((Path(__file__).parents[2] / "crds/samples").glob("*.yaml"))
IMMUTABLE = {
    "model": {"source": "hf://org/other"},
    "dataset": {"source": "s3://data/other.jsonl"},
    "adapter": {"rank": 32},
    "training": {"seed": 1},
    "export": {"gguf": []},
    "output": {"s3": {"bucket": "others"}},
    "resources": {"gpus": 0},
    "runPolicy": {"maxRetries": 0},
}
RUN_POLICY = {"maxRetries": 0, "stallTimeoutSeconds": 600}
MUTABLE = {"suspend": True, "activeDeadlineSeconds": 60, "startupDeadlineSeconds": 60, "ttlSecondsAfterFinished": 5}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_every_sample_and_its_children_are_accepted(crd_cluster: DevCluster, sample: Path) -> None:
    applied = crd_cluster.kubectl("apply", "--server-side", "--dry-run=server", "-f", str(sample))
    assert "Warning" not in applied.stderr
    job = load_manifest(sample.read_text())
    for build in (build_preflight_job, build_trainer_job):
        child = build(job.metadata, job.spec, "finetune-trainer:1", "run-config")
        child["metadata"].pop("ownerReferences")
        created = crd_cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(child))
        assert "Warning" not in created.stderr


def test_the_server_fills_the_defaults_that_the_models_have(jobs: Any, minimal: dict[str, Any]) -> None:
    assert jobs.apply(minimal) == ""
    stored = jobs.get("tried")
    ours = load_manifest(yaml.safe_dump(minimal)).spec.to_wire()
    assert stored["spec"] == ours
    assert FineTuneJob.from_object(stored).spec.to_wire() == ours


@pytest.mark.parametrize("section", IMMUTABLE)
def test_what_defines_the_training_cannot_change(jobs: Any, minimal: dict[str, Any], section: str) -> None:
    assert jobs.apply(minimal) == ""
    minimal["spec"][section] = IMMUTABLE[section]
    refusal = jobs.apply(minimal)
    assert f"spec.{section}" in refusal
    assert "cannot change after creation" in refusal


@pytest.mark.parametrize("field", RUN_POLICY)
def test_a_policy_that_pods_have_read_cannot_change(jobs: Any, minimal: dict[str, Any], field: str) -> None:
    """Neither added nor removed nor changed."""
    assert jobs.apply(minimal) == ""
    written = deepcopy(minimal)
    written["spec"]["runPolicy"] = {field: RUN_POLICY[field]}
    assert f"spec.runPolicy.{field}" in jobs.apply(written)
    assert jobs.apply(minimal) == ""


@pytest.mark.parametrize("field", MUTABLE)
def test_suspension_deadline_and_ttl_can_change(jobs: Any, minimal: dict[str, Any], field: str) -> None:
    assert jobs.apply(minimal) == ""
    minimal["spec"]["runPolicy"] = {field: MUTABLE[field]}
    assert jobs.apply(minimal) == ""
    assert jobs.get("tried")["spec"]["runPolicy"][field] == MUTABLE[field]


def test_kubectl_explain_has_a_sentence_for_every_field(crd_cluster: DevCluster) -> None:
    definition = yaml.safe_load(crd_cluster.kubectl("get", "crd", "finetunejobs.finetune.dev", "-o", "yaml").stdout)
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    silent = []

    def walk(path: str, node: dict[str, Any]) -> None:
        for name, field in node.get("properties", {}).items():
            if not field.get("description", "").endswith((".", ".)")):
                silent.append(f"{path}.{name}")
            walk(f"{path}.{name}", field.get("items", field))

    walk("spec", schema["properties"]["spec"])
    walk("status", schema["properties"]["status"])
    assert not silent
    text = crd_cluster.kubectl("explain", "ftj.spec.model.maxSequenceLength").stdout
    assert re.search(r"Default\s+2048", text)


def test_the_full_sample_names_every_field() -> None:
    """Alternatives that exclude each other stand in its comments."""
    text = (Path(__file__).parents[2] / "crds/samples/full.yaml").read_text()
    missing = []

    def walk(path: str, node: dict[str, Any]) -> None:
        for name, field in node.get("properties", {}).items():
            if not re.search(rf"\b{name}\b", text):
                missing.append(f"{path}.{name}")
            walk(f"{path}.{name}", field)
            walk(f"{path}.{name}", field.get("items", {}))

    walk("spec", custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"])
    assert not missing


def test_optional_scalars_say_their_default(crd_cluster: DevCluster) -> None:
    definition = yaml.safe_load(crd_cluster.kubectl("get", "crd", "finetunejobs.finetune.dev", "-o", "yaml").stdout)
    spec = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    unsaid = []

    def walk(path: str, node: dict[str, Any]) -> None:
        for name, field in node.get("properties", {}).items():
            needed = name in node.get("required", [])
            if "properties" not in field and field["type" if "type" in field else "x-kubernetes-int-or-string"]:
                said = "default" in field.get("description", "").lower() or needed
                if not said and field.get("type") not in ("object", "array"):
                    unsaid.append(f"{path}.{name}")
            walk(f"{path}.{name}", field)

    walk("spec", spec)
    assert not unsaid
