"""Differences and agreements of the two doors, the API server and the command line, beyond the table of manifests."""

import copy
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from finetune_api.explain import explain_errors
from finetune_api.job import load_manifest

pytestmark = pytest.mark.cluster
Manifest = dict[str, Any]


def test_only_a_cluster_requires_a_bucket(jobs: Any, minimal: Manifest) -> None:
    manifest = copy.deepcopy(minimal)
    del manifest["spec"]["output"]["s3"]["bucket"]
    assert "spec.output.s3.bucket: Required value" in jobs.apply(manifest, dry_run=True)
    del manifest["spec"]["output"]
    assert "spec.output: Required value" in jobs.apply(manifest, dry_run=True)
    assert load_manifest(yaml.safe_dump(manifest)).spec.output.s3.bucket is None


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "max_sequence_length", 256),
        ("model", "chat_template_name", "Gemma"),
        ("training", "learning_rate", 2e-4),
        ("training", "batch_size", 2),
        ("dataset", "train_on", "All"),
    ],
)
def test_fields_are_in_camel_case_only_on_both_doors(
    jobs: Any, minimal: Manifest, section: str, field: str, value: Any
) -> None:
    manifest = copy.deepcopy(minimal)
    manifest["spec"].setdefault(section, {})[field] = value
    assert f"spec.{section}.{field}: field not declared in schema" in jobs.apply(manifest, dry_run=True)
    with pytest.raises(ValidationError) as found:
        load_manifest(yaml.safe_dump(manifest))
    expected = f"spec.{section}.{field}: there is no such field; did you mean {to_camel(field)}?"
    assert [str(error) for error in explain_errors(found.value, manifest)] == [expected]


def test_a_name_must_fit_a_label(jobs: Any, minimal: Manifest) -> None:
    assert jobs.apply(minimal | {"metadata": {"name": "a" * 63}}, dry_run=True) == ""
    assert "choose a shorter name" in jobs.apply(minimal | {"metadata": {"name": "a" * 64}}, dry_run=True)
