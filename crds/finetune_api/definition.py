"""The CustomResourceDefinition: schema, names, printer columns, and the rules that only a cluster can enforce."""

from typing import Any

from pydantic.fields import FieldInfo

from finetune_api import GROUP, KIND, PLURAL, VERSION
from finetune_api.spec.run import MAX_NAME_ON_NODES, RunPolicySpec
from finetune_api.spec.spec import IMMUTABLE_SECTIONS, MUTABLE_RUN_POLICY, FineTuneJobSpec
from finetune_api.status import NO_GENERATION, FineTuneJobStatus
from finetune_api.structural import Schema, structural_schema

MAX_NAME_CHARACTERS = 63  # characters; the name becomes a label value on the job's pods
NOTHING_OBSERVED = {"observedGeneration": NO_GENERATION}
"""Status of a job that no operator has looked at. kstatus calls an object without a status done, and one whose
generation was not observed in progress."""

COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    ("Phase", "string", ".status.phase", 0),
    ("Reason", "string", ".status.reason", 0),
    ("Progress", "string", ".status.progress.completion", 0),
    ("Loss", "number", ".status.progress.loss", 0),
    ("ETA", "string", ".status.progress.eta", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Model", "string", ".spec.model.source", 1),
    ("Queue", "string", ".spec.scheduling.queueName", 1),
    ("Step", "integer", ".status.progress.step", 1),
    ("Steps", "integer", ".status.progress.totalSteps", 1),
    ("Retries", "integer", ".status.retries", 1),
    ("GPU-Hours", "number", ".status.usage.gpuHours", 1),
    ("Cost", "number", ".status.usage.cost", 1),
    ("Artifacts", "string", ".status.manifestUri", 1),
)


def custom_resource_definition() -> dict[str, Any]:
    """Build the CustomResourceDefinition."""
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path} | ({"priority": priority} if priority else {})
            for name, kind, path, priority in COLUMNS
        ],
        "schema": {"openAPIV3Schema": _schema()},
    }

    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": KIND.lower(),
        "shortNames": ["ftj"],
        "categories": ["all"],
    }

    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def _schema() -> Schema:
    spec = structural_schema(FineTuneJobSpec)
    spec.setdefault("x-kubernetes-validations", []).extend(_immutability())
    for section in ("model", "dataset"):
        spec["properties"][section].setdefault("x-kubernetes-validations", []).append(_no_local_files(section))
    _require(spec, "output", "s3", "bucket")

    return {
        "type": "object",
        "description": "A fine-tuning job: base model and data in, adapter, merged weights and GGUF files out.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": structural_schema(FineTuneJobStatus, defaults=False) | {"default": NOTHING_OBSERVED},
        },
        "x-kubernetes-validations": [
            {
                "rule": f"size(self.metadata.name) <= {MAX_NAME_CHARACTERS}",
                "message": f"metadata.name must have at most {MAX_NAME_CHARACTERS} characters: choose a shorter name",
            },
            {
                "rule": f"self.spec.resources.nodes < 2 || size(self.metadata.name) <= {MAX_NAME_ON_NODES}",
                "message": f"metadata.name must have at most {MAX_NAME_ON_NODES} characters with spec.resources.nodes: "
                "its pods' host names are longer; choose a shorter name",
            },
        ],
    }


def _immutability() -> list[dict[str, str]]:
    """CEL rules that freeze every field which defines what is trained."""
    fields = list(IMMUTABLE_SECTIONS)
    policies = {field.alias or name: field for name, field in RunPolicySpec.model_fields.items()}
    fields += [f"runPolicy.{alias}" for alias in policies if alias not in MUTABLE_RUN_POLICY]
    allowed = ", ".join(f"runPolicy.{name}" for name in MUTABLE_RUN_POLICY)
    return [
        {
            "rule": f"self.{_select(field, policies)} == oldSelf.{_select(field, policies)}",
            "message": f"spec.{field} cannot change after creation (only {allowed} can): create another job",
        }
        for field in fields
    ]


def _select(field: str, policies: dict[str, FieldInfo]) -> str:
    """Writes a field as CEL selects it; with a question mark if it may be absent."""
    section, _, alias = field.partition(".")
    is_optional = alias != "" and policies[alias].default is None
    return f"{section}.?{alias}" if is_optional else field


def _require(schema: Schema, *path: str) -> None:
    """Require a field, and every section around it: `finetune run --output DIR` alone goes without a bucket."""
    for name in path:
        schema.setdefault("required", []).append(name)
        schema = schema["properties"][name]
        schema.pop("default", None)


def _no_local_files(section: str) -> dict[str, str]:
    return {
        "rule": "!self.source.startsWith('file://')",
        "message": f"spec.{section}.source: file:// names a disk that the cluster does not have: write hf://, s3:// or pvc://",
    }
