"""The FineTuneJob resource as a whole, and reading it from a manifest."""

import json
import re
from collections.abc import Iterable
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field

from finetune_api import API_VERSION, KIND
from finetune_api.base import FieldPath, without_nulls
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus


class ObjectMeta(BaseModel):
    """The Kubernetes metadata that we read; other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = Field("", alias="resourceVersion")
    creation_timestamp: str | None = Field(None, alias="creationTimestamp")
    deletion_timestamp: str | None = Field(None, alias="deletionTimestamp")
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class FineTuneJob(BaseModel):
    """A FineTuneJob as the API server returns it, or as a user wrote it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    api_version: Literal["finetune.dev/v1alpha1"] = Field(API_VERSION, alias="apiVersion")
    kind: Literal["FineTuneJob"] = KIND
    metadata: ObjectMeta
    spec: FineTuneJobSpec
    status: FineTuneJobStatus = FineTuneJobStatus()

    @classmethod
    def from_object(cls, body: dict[str, Any]) -> Self:
        """Parse an object of the API server; raises pydantic.ValidationError with every error at once."""
        return cls.model_validate(body, by_alias=True, by_name=False)


class _ManifestLoader(yaml.SafeLoader):
    """YAML loader that reads as kubectl does: `2e-4` is a number, `1e3` an integer, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float | int:
        value: float = self.construct_yaml_float(node)
        return int(value) if value.is_integer() else value


_ManifestLoader.add_constructor("tag:yaml.org,2002:float", _ManifestLoader.construct_number)
_ManifestLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_document(text: str) -> Any:
    """Read a manifest's YAML, without the fields that are null. Raises yaml.YAMLError."""
    return without_nulls(yaml.load(text, Loader=_ManifestLoader))  # noqa: S506 (a SafeLoader)


def validate_document(document: Any) -> FineTuneJob:
    """Validate a manifest as strictly as the API server does: text is not a number, fields are in camelCase, and an
    empty section gets its defaults. Raises pydantic.ValidationError with every error at once."""
    text = json.dumps(document, default=str)
    return FineTuneJob.model_validate_json(text, strict=True, by_alias=True, by_name=False)


def load_manifest(text: str) -> FineTuneJob:
    """Read and validate a user's manifest. Raises yaml.YAMLError or pydantic.ValidationError."""
    return validate_document(read_document(text))


def find_lines(text: str, paths: Iterable[FieldPath]) -> dict[FieldPath, int]:
    """Return the line of each field of a manifest, counted from 1; for a field that is not there, the line of the
    nearest section around it."""
    root = yaml.compose(text, Loader=_ManifestLoader)
    return {path: _find_line(root, path) for path in paths} if root is not None else {}


def _find_line(node: yaml.Node, path: FieldPath) -> int:
    line = node.start_mark.line
    for part in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        elif isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
    return line + 1
