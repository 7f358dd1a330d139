"""Explains a result that lacks an export: which one failed, what is published, and the command that goes on. Pure."""

import shlex
from typing import Any

from finetune_api.outcome import FailedExport
from finetune_api.spec.sources import Scheme, Source
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.manifest import Manifest

NAMES = {ArtifactType.MERGED: "merged weights", ArtifactType.GGUF: "GGUF"}


def explain_failed_exports(manifest: Manifest) -> str:
    """One sentence on each failed export, and the command."""
    kinds = [artifact.type for artifact in manifest.artifacts]
    kept = "adapter and merged weights are" if ArtifactType.MERGED in kinds else "adapter is"
    failed = "; ".join(f"{NAMES[each.type]} {each.quantization}: {each.message}" for each in manifest.failed_exports)
    return f"training succeeded and the {kept} published, but not {failed}. To go on: {export_command(manifest)}"


def export_command(manifest: Manifest) -> str:
    """The `finetune export` that makes the failed exports from what is published."""
    adapter = next(artifact.uri for artifact in manifest.artifacts if artifact.type is ArtifactType.ADAPTER)
    words = ["finetune", "export", "--base", manifest.model_source]
    if manifest.model_revision and Source.parse(manifest.model_source).scheme is Scheme.HUGGING_FACE:
        words += ["--revision", manifest.model_revision]
    words += ["--adapter", adapter, "--output", f"{manifest.job.name}-export", "--name", manifest.job.name]

    for each in manifest.failed_exports:
        words += [_option(each), each.quantization]
    # An adapter in a store that is not AWS is found only with the store's address.
    run: Any = manifest.configuration.get("run") or {}
    store = run.get("output", {}).get("s3", {}) if adapter.startswith("s3://") else {}
    for key, option in (("endpointURL", "--endpoint-url"), ("region", "--region")):
        words += [option, str(store[key])] if store.get(key) else []
    return shlex.join(words)


def _option(failed: FailedExport) -> str:
    return "--merged" if failed.type is ArtifactType.MERGED else "--gguf"
