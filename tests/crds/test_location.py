"""Whatever a user writes, a job's keys stay below the layout that the administrator chose."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_api.job import load_manifest
from finetune_api.spec.location import LocationTemplate
from finetune_api.spec.output import S3Output

Manifest = dict[str, Any]
ALPHABET = st.sampled_from([*"aZ0._-!*'()/%", "..", "//", "%2e", "\uff0e", "é", "\n", "\\", "{name}"])
PREFIXES = st.lists(ALPHABET, max_size=8).map("".join)
TEMPLATES = st.lists(st.sampled_from([*"a./", "..", "{namespace}", "{name}", "{uid}", "{", "{x}"]), max_size=8).map(
    "".join
)
JOB = {"namespace": "team", "name": "bot.v2", "uid": "0b5e7b1e"}


@given(PREFIXES)
def test_a_prefix_is_refused_or_leads_down_to_the_job(prefix: str) -> None:
    try:
        accepted = S3Output.model_validate({"prefix": prefix}).prefix
    except ValidationError:
        return

    resolved = LocationTemplate().resolve(accepted, **JOB)
    assert resolved.endswith("team/bot.v2")
    assert not {"", ".", ".."} & set(resolved.split("/"))
    assert set(resolved) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-!*'()/")


@given(TEMPLATES)
def test_a_template_is_refused_or_names_the_job(text: str) -> None:
    try:
        template = LocationTemplate(text)
    except ValueError:
        return

    resolved = template.resolve("out/", **JOB)
    assert resolved.startswith("out/")
    assert "bot.v2" in resolved or "0b5e7b1e" in resolved
    assert not {"", ".", ".."} & set(resolved.split("/"))


@pytest.mark.parametrize("prefix", ["", "models", "models/", "a/b.c"])
def test_plain_prefixes_are_accepted(prefix: str) -> None:
    resolved = LocationTemplate().resolve(S3Output.model_validate({"prefix": prefix}).prefix, **JOB)
    assert resolved == f"{prefix.strip('/')}/team/bot.v2".lstrip("/")


@pytest.mark.parametrize("prefix", ["/a", "a//b", "./a", "../a", "a/../b", "a/%2e%2e/b", "a/\uff0e\uff0e/b", "a\\b"])
def test_both_doors_refuse_what_leads_elsewhere(jobs: Any, minimal: Manifest, prefix: str) -> None:
    output = {"s3": {"bucket": "models", "prefix": prefix}}
    manifest = minimal | {"spec": minimal["spec"] | {"output": output}}
    assert "output.s3.prefix" in jobs.apply(manifest, dry_run=True)
    with pytest.raises(ValidationError, match=r"s3\.prefix"):
        load_manifest(yaml.safe_dump(manifest))
