"""What the API server accepts and refuses, and that `finetune validate` says the same: one table, both doors."""

import copy
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from finetune_api.job import load_manifest
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.structural import structural_schema
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_test_operator.rule_messages import messages
from finetune_test_operator.two_doors import refusals

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
    "samples of held-out rows": {"training": {"samples": {}}, "dataset": {"evaluation": {"fraction": 0.1}}},
    "samples at intervals, without evaluation": {"training": {"evaluationSteps": 5, "samples": {"prompts": ["a"]}}},
    "products in 8 bits": {"training": {"precision": "FP8"}},
    "products in 8 bits of weights that are not kept": {"training": {"precision": "FP8", "memory": "Smallest"}},
    "early stopping and the best adapter": {
        "training": {"evaluationSteps": 5, "earlyStopping": {}, "keepBest": True},
        "dataset": {"evaluation": {"fraction": 0.1}},
    },
    "another split to evaluate on": {
        "dataset": {"source": "hf://org/data", "evaluation": {"split": "validation"}},
    },
    "a split of another dataset": {
        "dataset": {"source": "hf://org/data", "evaluation": {"source": "hf://org/more", "split": "train"}},
    },
    "a file of the same claim to evaluate on": {
        "dataset": {"source": "pvc://claim/a.jsonl", "evaluation": {"source": "pvc://claim/b.jsonl"}},
    },
    "no GGUF and no merged weights": {"export": {"merged": "None", "gguf": []}},
    "quantities as numbers and as strings": {"resources": {"cpu": 2, "memory": "512Mi", "ephemeralStorage": "1.5Ti"}},
    "the smallest quantities": {"resources": {"cpu": "1m", "memory": "0.5Gi", "ephemeralStorage": 1}},
    "a fraction of a core": {"resources": {"cpu": "0.25"}},
    "no checks, for a GPU of known size": {
        "resources": {"gpuMemory": "141Gi"},
        "runPolicy": {"preflight": "Skip"},
    },
    "a claim with dots in its name": {"model": {"source": "pvc://team.models/llama/"}},
    "the longest times": {
        "runPolicy": {"activeDeadlineSeconds": 2**31 - 1, "ttlSecondsAfterFinished": 2**31 - 1, "maxRetries": 20},
    },
    "the longest wait": {"runPolicy": {"startupDeadlineSeconds": 2**31 - 1}},
    "the shortest stall": {"runPolicy": {"stallTimeoutSeconds": 10}},
    "everything about a node": {
        "resources": {
            "nodeSelector": {"example.com/" + "x" * 63: "y" * 63, "zone": ""},
            "tolerations": [{"key": "a.b/c", "value": "d", "effect": "NoExecute", "tolerationSeconds": 2**31 - 1}],
            "gpuResourceName": "example.com/" + "x" * 63,
            "runtimeClassName": "a.b",
        },
    },
    "a section left empty": {"adapter": None, "export": {"gguf": None}},
    "whole numbers with an exponent": {"training": {"maxSteps": 1e3, "learningRate": 1e-4}},
    "a toleration of everything": {"resources": {"tolerations": [{"operator": "Exists"}]}},
    "a step that GPUs share": {"resources": {"gpus": 4}},
    "a step that nodes share": {"resources": {"gpus": 4, "nodes": 2}},
    "a JobSet on two nodes": {"resources": {"gpus": 4, "nodes": 2, "multiNode": "JobSet"}},
    "nodes without GPUs": {"resources": {"gpus": 0, "nodes": 2}, "training": {"batchSize": 2}},
    "the bounds themselves": {
        "training": {"batchSize": 1024, "warmupSteps": 0},
        "adapter": {"rank": 512, "dropout": 0},
    },
}

# changes, the field that the message must name, and a part of what it must say to write instead
INVALID: dict[str, tuple[Manifest, str, str]] = {
    "memory of a GPU that is not asked for": (
        {"resources": {"gpus": 0, "gpuMemory": "80Gi"}},
        "spec.resources.gpuMemory",
        "write gpus: 1",
    ),
    "a step that two GPUs cannot share": (
        {"resources": {"gpus": 2}, "training": {"batchSize": 1, "gradientAccumulation": 5}},
        "spec.training",
        "must be a multiple of spec.resources.gpus",
    ),
    "a step that the GPUs of two nodes cannot share": (
        {"resources": {"gpus": 2, "nodes": 2}, "training": {"batchSize": 2, "gradientAccumulation": 3}},
        "spec.training",
        "must be a multiple of spec.resources.gpus x spec.resources.nodes",
    ),
    "a JobSet on one node": ({"resources": {"multiNode": "JobSet"}}, "spec.resources", "JobSet is for several nodes"),
    "no node": ({"resources": {"nodes": 0}}, "resources.nodes", "greater than or equal to 1"),
    "too many nodes": ({"resources": {"nodes": 65}}, "resources.nodes", "less than or equal to 64"),
    "a source without scheme": ({"model": {"source": "meta/llama"}}, "model.source", "hf://org/name"),
    "a source that climbs out": ({"model": {"source": "s3://data/../x"}}, "spec.model.source", "without it"),
    "data that climb out": ({"dataset": {"source": "pvc://claim/.."}}, "spec.dataset.source", "without it"),
    "a subset of an S3 source": (
        {"dataset": {"source": "s3://bucket/x/", "subset": "de"}},
        "spec.dataset.subset",
        "only goes with an hf:// source",
    ),
    "an S3 revision": ({"model": {"source": "s3://bucket/x/", "revision": "main"}}, "spec.model.revision", "remove it"),
    "an unknown field": ({"training": {"learningrate": 1}}, "training.learningrate", ""),
    "a negative batch size": ({"training": {"batchSize": 0}}, "training.batchSize", "greater than or equal to 1"),
    "a dropout of one": ({"adapter": {"dropout": 1}}, "adapter.dropout", "less than 1"),
    "a learning rate of zero": ({"training": {"learningRate": 0}}, "training.learningRate", "greater than 0"),
    "parts for FP8": ({"training": {"precision": "FP8", "parallelism": "Sharded"}}, "spec.training", "FP8 keeps all"),
    "a rank as text": ({"adapter": {"rank": "sixteen"}}, "adapter.rank", ""),
    "epochs and steps together": ({"training": {"epochs": 1, "maxSteps": 1}}, "spec.training.epochs", "one of them"),
    "all-linear and more": (
        {"adapter": {"targetModules": ["all-linear", "q_proj"]}},
        "spec.adapter.targetModules",
        "[all-linear] alone",
    ),
    "experts of a higher rank": ({"adapter": {"expertRank": 17}}, "spec.adapter.expertRank", "raise rank"),
    "no target modules": ({"adapter": {"targetModules": []}}, "adapter.targetModules", "at least 1"),
    "evaluation steps without held-out rows": (
        {"training": {"evaluationSteps": 5}},
        "spec.training.evaluationSteps",
        "spec.dataset.evaluation.fraction",
    ),
    "early stopping without evaluations": (
        {"training": {"earlyStopping": {}}, "dataset": {"evaluation": {"fraction": 0.1}}},
        "spec.training.earlyStopping",
        "spec.training.evaluationSteps",
    ),
    "the best of nothing": (
        {"training": {"keepBest": True}},
        "spec.training.keepBest",
        "spec.dataset.evaluation.fraction",
    ),
    "FP8 of weights that are not quantised": (
        {"training": {"precision": "FP8"}, "model": {"quantization": "None"}},
        "spec.training.precision",
        "spec.model.quantization: NF4",
    ),
    "no patience": (
        {
            "training": {"evaluationSteps": 5, "earlyStopping": {"patience": 0}},
            "dataset": {"evaluation": {"fraction": 0.1}},
        },
        "training.earlyStopping.patience",
        "greater than or equal to 1",
    ),
    "samples of nothing": ({"training": {"samples": {}}}, "spec.training.samples", "write prompts"),
    "an empty prompt": ({"training": {"samples": {"prompts": [""]}}}, "training.samples.prompts", "at least 1"),
    "an evaluation of nothing": ({"dataset": {"evaluation": {}}}, "spec.dataset.evaluation", "one of them"),
    "two things to evaluate on": (
        {"dataset": {"source": "hf://org/data", "evaluation": {"fraction": 0.1, "split": "validation"}}},
        "spec.dataset.evaluation",
        "one of them",
    ),
    "evaluation data that climb out": (
        {"dataset": {"evaluation": {"source": "s3://data/../x"}}},
        "spec.dataset.evaluation.source",
        "without it",
    ),
    "evaluation data of another kind": (
        {"dataset": {"source": "hf://org/data", "evaluation": {"source": "s3://bucket/x.jsonl"}}},
        "spec.dataset.evaluation.source",
        "put both into",
    ),
    "evaluation data in another claim": (
        {"dataset": {"source": "pvc://claim/a", "evaluation": {"source": "pvc://other/a"}}},
        "spec.dataset.evaluation.source",
        "one claim",
    ),
    "the split that trains": (
        {"dataset": {"source": "hf://org/data", "evaluation": {"split": "train"}}},
        "spec.dataset.evaluation.split",
        "such as validation",
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
    "too many GPUs": ({"resources": {"gpus": 17}}, "resources.gpus", "less than or equal to 16"),
    "two chat templates": (
        {"model": {"chatTemplate": "x", "chatTemplateName": "ChatML"}},
        "spec.model.chatTemplate",
        "one of them",
    ),
    "a revision with a space": ({"model": {"revision": "a b"}}, "model.revision", "a branch, tag or commit"),
    "a new token with a space": ({"model": {"newTokens": ["<a> "]}}, "model.newTokens", "without spaces at its ends"),
    "a split with a space": ({"dataset": {"split": "a b"}}, "dataset.split", "such as train"),
    "a claim with two dots": ({"model": {"source": "pvc://a..b/c"}}, "model.source", "pvc://claim/path"),
    "a secret with a capital": ({"model": {"credentials": {"secretName": "Hub"}}}, "secretName", "the object's name"),
    "a module with a space": ({"adapter": {"targetModules": ["q proj"]}}, "targetModules", "such as q_proj"),
    "a repository without its organisation": (
        {"output": {"hub": {"repository": "model", "credentials": {"secretName": "hub"}}}},
        "output.hub.repository",
        "organisation/name",
    ),
    "a prefix with a space": ({"output": {"s3": {"prefix": "a b"}}}, "output.s3.prefix", "a folder's name"),
    "a region in words": ({"output": {"s3": {"region": "Frankfurt"}}}, "output.s3.region", "such as eu-central-1"),
    "more rows than can be counted": ({"dataset": {"maxSamples": 2**53}}, "dataset.maxSamples", "less than or equal"),
    "cores with a unit of bytes": ({"resources": {"cpu": "4Gi"}}, "resources.cpu", "number of cores"),
    "fewer cores than none": ({"resources": {"cpu": -1}}, "resources.cpu", "a positive number"),
    "no cores": ({"resources": {"cpu": "0.0"}}, "resources.cpu", "a positive number"),
    "a memory with a wrong unit": ({"resources": {"memory": "32GB"}}, "resources.memory", "such as 32Gi"),
    "a thousandth of a byte": ({"resources": {"memory": "512m"}}, "resources.memory", "such as 32Gi"),
    "no memory": ({"resources": {"memory": 0}}, "resources.memory", "a positive number"),
    "no disk": ({"resources": {"ephemeralStorage": "0Gi"}}, "resources.ephemeralStorage", "a positive number"),
    "a label's value with a space": ({"resources": {"nodeSelector": {"zone": "a b"}}}, "nodeSelector", "at most 63"),
    "a label's key with a space": ({"resources": {"nodeSelector": {"a b": "c"}}}, "nodeSelector", "example.com/zone"),
    "a label's key that is too long": ({"resources": {"nodeSelector": {TOO_LONG: "c"}}}, "nodeSelector", "write a key"),
    "a GPU without vendor": ({"resources": {"gpuResourceName": "gpu"}}, "gpuResourceName", "such as nvidia.com/gpu"),
    "a GPU as a quota names it": (
        {"resources": {"gpuResourceName": "requests.nvidia.com/gpu"}},
        "spec.resources.gpuResourceName",
        "without 'requests.'",
    ),
    "a runtime class with two dots": ({"resources": {"runtimeClassName": "a..b"}}, "runtimeClassName", "single dots"),
    "seconds beyond what a Job takes": (
        {"runPolicy": {"ttlSecondsAfterFinished": 2**31}},
        "runPolicy.ttlSecondsAfterFinished",
        "less than or equal",
    ),
    "no time to start": ({"runPolicy": {"startupDeadlineSeconds": 0}}, "startupDeadlineSeconds", "equal to 1"),
    "no time for a step": ({"runPolicy": {"stallTimeoutSeconds": 9}}, "stallTimeoutSeconds", "equal to 10"),
    "seconds of an effect that has none": (
        {"resources": {"tolerations": [{"key": "a", "effect": "NoSchedule", "tolerationSeconds": 1}]}},
        "spec.resources.tolerations",
        "only goes with effect NoExecute",
    ),
    "a number as text": ({"training": {"batchSize": "4"}}, "training.batchSize", ""),
    "a switch as a number": ({"runPolicy": {"suspend": 1}}, "runPolicy.suspend", ""),
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


def named(child: Manifest) -> Manifest:
    """A child as it would be applied by hand: no owner, in the test's namespace."""
    metadata = {key: value for key, value in child["metadata"].items() if key in ("name", "labels", "annotations")}
    return child | {"metadata": metadata}


@pytest.mark.parametrize("changes", VALID.values(), ids=VALID)
def test_valid(jobs: Any, minimal: Manifest, changes: Manifest) -> None:
    manifest = minimal | {"spec": changed(minimal["spec"], changes)}
    assert jobs.apply(manifest, dry_run=True) == ""
    job = load_manifest(yaml.safe_dump(manifest))
    child = build_trainer_job(job.metadata, job.spec, "finetune-trainer:1", "config")
    child["spec"]["ttlSecondsAfterFinished"] = job.spec.run_policy.ttl_seconds_after_finished  # set at the end only
    assert jobs.apply(named(child), dry_run=True) == "", "what the CRD accepts, the API server must take as a Job"


@pytest.mark.parametrize(("changes", "field", "remedy"), INVALID.values(), ids=INVALID)
def test_invalid_names_the_field_and_what_to_write(
    jobs: Any, minimal: Manifest, changes: Manifest, field: str, remedy: str
) -> None:
    manifest = minimal | {"spec": changed(minimal["spec"], changes)}
    for refusal in refusals(jobs, manifest):
        assert field in refusal
        assert remedy in refusal


def test_every_rule_is_broken_by_a_manifest_of_the_table(minimal: Manifest) -> None:
    refusals = []
    for changes, _, _ in INVALID.values():
        with pytest.raises(ValidationError) as found:
            load_manifest(yaml.safe_dump(minimal | {"spec": changed(minimal["spec"], changes)}))
        refusals.append(str(found.value))
    schema = structural_schema(FineTuneJobSpec)
    del schema["properties"]["scheduling"], schema["properties"]["pod"]  # test_scheduling.py, pods/test_pod.py
    assert len(messages(schema)) > 20
    assert not [message for message in messages(schema) if not any(message in refusal for refusal in refusals)]


def test_only_a_cluster_refuses_local_files(jobs: Any, minimal: Manifest) -> None:
    manifest = minimal | {"spec": changed(minimal["spec"], {"model": {"source": "file:///models/x"}})}
    refusal = jobs.apply(manifest, dry_run=True)
    assert "spec.model.source: file:// names a disk that the cluster does not have" in refusal
    load_manifest(yaml.safe_dump(manifest))


def test_several_errors_are_reported_together(jobs: Any, minimal: Manifest) -> None:
    changes = {"training": {"epochs": 1, "maxSteps": 2}, "export": {"gguf": ["F16", "F16"]}}
    manifest = minimal | {"spec": changed(minimal["spec"], changes)}
    refusal = jobs.apply(manifest, dry_run=True)
    assert "spec.training.epochs" in refusal
    assert "spec.export.gguf" in refusal
    with pytest.raises(ValidationError) as found:
        load_manifest(yaml.safe_dump(manifest))
    assert found.value.error_count() == 2
