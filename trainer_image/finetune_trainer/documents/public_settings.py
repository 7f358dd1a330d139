"""The settings that a model card shows: those that differ from the defaults, without places of the machine that ran it.

`resolved.yaml` holds everything.
"""

from typing import Any

from finetune_api.run_config import RunConfig
from finetune_api.spec.sources import Scheme, Source

SECTIONS = ("model", "dataset", "adapter", "training", "export")
"""Parts of a job that say what is made of what."""


def changed_settings(config: RunConfig) -> dict[str, Any]:
    """Returns the job's settings that are not defaults, as a manifest's `spec` has them."""
    whole = config.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return {name: _public(whole[name]) for name in SECTIONS if whole.get(name)}


def public_source(uri: str) -> str:
    """Returns a source as others may see it: of a local path and of a claim, the last name only."""
    source = Source.parse(uri)
    if source.scheme is Scheme.HUGGING_FACE:
        return source.location
    if source.scheme is Scheme.S3:
        return uri
    return (source.path.rstrip("/").rpartition("/")[2] or source.location) + " (not public)"


def _public(value: Any) -> Any:
    """Returns settings without names of Secrets, and with public sources."""
    if isinstance(value, dict):
        kept = {name: entry for name, entry in value.items() if name != "credentials"}
        return {name: public_source(entry) if name == "source" else _public(entry) for name, entry in kept.items()}
    return [_public(entry) for entry in value] if isinstance(value, list) else value
