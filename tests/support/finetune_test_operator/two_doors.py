"""A manifest at both doors, the API server and the command line."""

from typing import Any

import yaml
from pydantic import ValidationError

from finetune_api.base import Json
from finetune_api.job import load_manifest


def refusals(jobs: Any, manifest: Json) -> tuple[str, str]:
    """What the API server and `finetune validate` say against a manifest; empty where one of them accepts it."""
    try:
        load_manifest(yaml.safe_dump(manifest))
    except ValidationError as error:
        return jobs.apply(manifest, dry_run=True), str(error)
    return jobs.apply(manifest, dry_run=True), ""
