"""What the API server accepts and refuses, and that `finetune validate` says the same: one table, both doors."""

import copy
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from finetune_api.job import load_manifest

pytestmark = pytest.mark.cluster
Manifest = dict[str, Any]
TOO_LONG = "a" * 64

VALID: dict[str, Manifest] = {
    "nothing but what is needed": {},
    "an S3 model and a revisionless source": {"model": {"source": "s3://bucket/base/"}},
    "a revision of a hub model": {"model": {"revision": "v1.0"}},
    "a claim's root": {"dataset": {"source": "pvc://claim"}},
    "all-linear alone": {"adapter": {"targetModules": ["all-linear"]}},
    "steps instead of epochs": {"training": {"maxSteps": 10}},
    "evaluation steps with held-out rows": {
        "training": {"evaluationSteps": 5},
        "dataset": {"evaluation": {"fraction": 0.1}},
    },
    "no GGUF and no merged weights": {"export": {"merged": "None", "gguf": []}},
    "quantities as numbers and as strings": {"resources": {"cpu": 2, "memory": "512Mi", "ephemeralStorage": "1.5Ti"}},
    "a toleration of everything": {"resources": {"tolerations": [{"operator": "Exists"}]}},
    "the bounds themselves": {
        "training": {"batchSize": 1024, "warmupSteps": 0},
        "adapter": {"rank": 512, "dropout": 0},
    },
}

# changes, the field that the message must name, and a part of what it must say to write instead
INVALID: dict[str, tuple[Manifest, str, str]] = {
    "a source without scheme": ({"model": {"source": "meta/llama"}}, "model.source", "hf://org/name"),
    "a source that climbs out": ({"dataset": {"source": "s3://b/../x"}}, "dataset.source", "'..'"),
    "a revision of an S3 model": (
        {"model": {"source": "s3://bucket/x/", "revision": "main"}},
        "spec.model.revision",
        "remove it",
    ),
    "an unknown field": ({"training": {"learningrate": 1}}, "training.learningrate", ""),
    "a negative batch size": ({"training": {"batchSize": 0}}, "training.batchSize", "greater than or equal to 1"),
    "a dropout of one": ({"adapter": {"dropout": 1}}, "adapter.dropout", "less than 1"),
    "a learning rate of zero": ({"training": {"learningRate": 0}}, "training.learningRate", "greater than 0"),
    "a rank as text": ({"adapter": {"rank": "sixteen"}}, "adapter.rank", "numeric"),
    "epochs and steps together": ({"training": {"epochs": 1, "maxSteps": 1}}, "spec.training.epochs", "one of them"),
    "all-linear and more": (
        {"adapter": {"targetModules": ["all-linear", "q_proj"]}},
        "spec.adapter.targetModules",
        "[all-linear] alone",
    ),
    "no target modules": ({"adapter": {"targetModules": []}}, "adapter.targetModules", "at least 1"),
    "evaluation steps without held-out rows": (
        {"training": {"evaluationSteps": 5}},
        "spec.training.evaluationSteps",
        "spec.dataset.evaluation.fraction",
    ),
    "a fraction above a half": (
        {"dataset": {"evaluation": {"fraction": 0.6}}},
        "dataset.evaluation.fraction",
        "less than or equal to 0.5",
    ),
    "a GGUF type twice": ({"export": {"gguf": ["Q8_0", "Q8_0"]}}, "spec.export.gguf", "each type once"),
    "an unknown GGUF type": ({"export": {"gguf": ["Q9_9"]}}, "export.gguf", "Q8_0"),
    "a bucket with a path": ({"output": {"s3": {"bucket": "models/x"}}}, "output.s3.bucket", "name alone"),
    "a prefix that climbs out": ({"output": {"s3": {"prefix": "a/../b"}}}, "spec.output.s3.prefix", "without"),
    "an endpoint without scheme": ({"output": {"s3": {"endpointURL": "minio:9000"}}}, "endpointURL", "https://minio"),
    "two GPUs": ({"resources": {"gpus": 2}}, "resources.gpus", "less than or equal to 1"),
    "cores with a unit of bytes": ({"resources": {"cpu": "4Gi"}}, "resources.cpu", ""),
    "a memory with a wrong unit": ({"resources": {"memory": "32GB"}}, "resources.memory", ""),
    "a label that is none": ({"resources": {"nodeSelector": {"zone": "a b"}}}, "nodeSelector", ""),
    "an Equal toleration without key": (
        {"resources": {"tolerations": [{}]}},
        "spec.resources.tolerations",
        "needs a key",
    ),
    "no grace": ({"runPolicy": {"terminationGracePeriodSeconds": 1}}, "terminationGracePeriodSeconds", "equal to 5"),
}


def changed(manifest: Manifest, changes: Manifest) -> Manifest:
    """A copy with `changes` merged in, field by field."""
    merged = copy.deepcopy(manifest)
    for section, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(section), dict):
            merged[section] = changed(merged[section], value)
        else:
            merged[section] = value
    return merged


@pytest.mark.parametrize("changes", VALID.values(), ids=VALID)
def test_valid(jobs: Any, minimal: Manifest, changes: Manifest) -> None:
    manifest = minimal | {"spec": changed(minimal["spec"], changes)}
    assert jobs.apply(manifest, dry_run=True) == ""
    load_manifest(yaml.safe_dump(manifest))


@pytest.mark.parametrize(("changes", "field", "remedy"), INVALID.values(), ids=INVALID)
def test_invalid_names_the_field_and_what_to_write(
    jobs: Any, minimal: Manifest, changes: Manifest, field: str, remedy: str
) -> None:
    manifest = minimal | {"spec": changed(minimal["spec"], changes)}
    refusal = jobs.apply(manifest, dry_run=True)
    assert field in refusal
    assert remedy in refusal
    with pytest.raises(ValidationError):
        load_manifest(yaml.safe_dump(manifest))


def test_only_a_cluster_refuses_local_files(jobs: Any, minimal: Manifest) -> None:
    manifest = minimal | {"spec": changed(minimal["spec"], {"model": {"source": "file:///models/x"}})}
    refusal = jobs.apply(manifest, dry_run=True)
    assert "spec.model.source: file:// names a disk that the cluster does not have" in refusal
    load_manifest(yaml.safe_dump(manifest))


def test_a_name_must_fit_a_label(jobs: Any, minimal: Manifest) -> None:
    assert jobs.apply(minimal | {"metadata": {"name": TOO_LONG[:-1]}}, dry_run=True) == ""
    assert "choose a shorter name" in jobs.apply(minimal | {"metadata": {"name": TOO_LONG}}, dry_run=True)


def test_several_errors_are_reported_together(jobs: Any, minimal: Manifest) -> None:
    changes = {"training": {"epochs": 1, "maxSteps": 2}, "export": {"gguf": ["F16", "F16"]}}
    manifest = minimal | {"spec": changed(minimal["spec"], changes)}
    refusal = jobs.apply(manifest, dry_run=True)
    assert "spec.training.epochs" in refusal
    assert "spec.export.gguf" in refusal
    with pytest.raises(ValidationError) as found:
        load_manifest(yaml.safe_dump(manifest))
    assert found.value.error_count() == 2
