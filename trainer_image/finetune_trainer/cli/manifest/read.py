"""Reads the job of a local run. Every error comes at once, a line each, with the manifest's line or with the option."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune_api import API_VERSION, KIND
from finetune_api.base import SUBDOMAIN
from finetune_api.explain import FieldError, explain_errors
from finetune_api.job import FineTuneJob, find_lines, read_document, validate_document
from finetune_api.spec.run import MAX_NAME_ON_NODES
from finetune_trainer.cli.machine import has_nvidia_gpu
from finetune_trainer.cli.manifest.options import OPTIONS, Change, apply_changes, option_of
from finetune_trainer.cli.manifest.sources import complete_sources

MAX_NAME_CHARACTERS = 63
NAME = ("metadata", "name")
BUCKET = ("spec", "output", "s3", "bucket")
GPUS = ("spec", "resources", "gpus")


class InvalidManifestError(Exception):
    """All errors of a job, one line each."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = tuple(errors)


@dataclass(frozen=True)
class LocalJob:
    """A valid job, and what a user should know of how it was read."""

    job: FineTuneJob
    notes: tuple[str, ...] = ()
    cluster_notes: tuple[str, ...] = ()
    """Changes that a cluster would ask for."""


def read_job(manifest: Path | None, changes: Sequence[Change], *, needs_bucket: bool) -> LocalJob:
    """Reads the manifest, if there is one, and writes the options' values over it. Raises InvalidManifestError."""
    text = _read_text(manifest) if manifest is not None else ""
    document = _parse(text, manifest) if manifest is not None else {"apiVersion": API_VERSION, "kind": KIND}
    apply_changes(document, changes)
    notes = _complete_without_manifest(document, changes) if manifest is None else []

    cluster_notes, errors = complete_sources(document, Path.cwd())
    try:
        job: FineTuneJob | None = validate_document(document)
    except ValidationError as error:
        job, errors = None, errors + explain_errors(error, document)
    if job is not None and not _is_name(job.metadata.name):
        message = f"found {job.metadata.name!r}: write at most {MAX_NAME_CHARACTERS} lower-case letters, digits and '-'"
        errors.append(FieldError(NAME, message))
    elif job is not None and job.spec.resources.nodes > 1 and len(job.metadata.name) > MAX_NAME_ON_NODES:
        message = f"found {len(job.metadata.name)} characters: write at most {MAX_NAME_ON_NODES}, as the pods of a job"
        errors.append(FieldError(NAME, f"{message} on several nodes have longer host names"))
    if job is not None and job.spec.output.s3.bucket is None:
        if needs_bucket:
            errors.append(FieldError(BUCKET, "is required: write the bucket, or give --output DIR for a folder"))
        cluster_notes.append("spec.output.s3.bucket: a cluster needs one")

    if errors or job is None:
        raise InvalidManifestError(_locate(errors, text, manifest, changes))
    return LocalJob(job, tuple(notes), tuple(cluster_notes))


def _read_text(manifest: Path) -> str:
    try:
        return manifest.read_text(encoding="utf-8")
    except FileNotFoundError:
        message = f"{manifest}: there is no such file; `finetune init {manifest}` writes one"
    except UnicodeDecodeError as error:
        message = f"{manifest}: byte {error.start} is not UTF-8: save the file as UTF-8"
    except OSError as error:
        message = f"{manifest}: {error.strerror}"
    raise InvalidManifestError([message])


def _parse(text: str, manifest: Path) -> dict[str, Any]:
    try:
        document = read_document(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        raise InvalidManifestError([f"{manifest}:{mark.line + 1 if mark else 1}: {message}"]) from None
    except yaml.YAMLError as error:
        raise InvalidManifestError([f"{manifest}: {error}"]) from None

    if not isinstance(document, dict):
        found = "is empty" if document is None else "is no manifest"
        raise InvalidManifestError([f"{manifest}: the file {found}; `finetune init` writes one to begin with"])
    return document


def _complete_without_manifest(document: dict[str, Any], changes: Sequence[Change]) -> list[str]:
    """Name and device of a job that options alone describe; returns what was chosen."""
    notes = []
    spec = document.setdefault("spec", {})
    metadata = document.setdefault("metadata", {})
    if isinstance(spec, dict) and isinstance(metadata, dict) and "name" not in metadata:
        metadata["name"] = _make_name(spec)
        notes.append(f"the job's name is {metadata['name']}; --name gives another")

    if option_of(GPUS, changes) is None and not has_nvidia_gpu():
        apply_changes(document, [Change("--gpus", GPUS, 0)])
        notes.append("this machine has no NVIDIA GPU, so the job trains on the CPU")
    return notes


def _is_name(name: str) -> bool:
    """True for a name that a cluster takes as well; it is also the name of the result's folder."""
    return len(name) <= MAX_NAME_CHARACTERS and re.fullmatch(SUBDOMAIN, name) is not None


def _make_name(spec: dict[str, Any]) -> str:
    """Name of a job, made of the last parts of its sources."""
    sources = [(spec.get(section) or {}).get("source") for section in ("model", "dataset")]
    parts = [Path(source.rstrip("/")).name for source in sources if isinstance(source, str)]
    if len(parts) == 2:
        parts[1] = parts[1].partition(".")[0]
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower())
    return name[:MAX_NAME_CHARACTERS].strip("-") or "job"


def _locate(errors: Sequence[FieldError], text: str, manifest: Path | None, changes: Sequence[Change]) -> list[str]:
    """Lines of text: each error behind the option that gave the field, or behind the manifest's line."""
    lines = find_lines(text, [error.path for error in errors])
    found = []
    for error in sorted(errors, key=lambda error: lines.get(error.path, 0)):
        option = option_of(error.path, changes)
        if option is not None:
            found.append(f"{option.option}: {error}")
        elif manifest is not None:
            found.append(f"{manifest}:{lines.get(error.path, 1)}: {error}")
        else:
            found.append(_name_option(error))
    return found


def _name_option(error: FieldError) -> str:
    """An error of a job without a manifest, in a field that no option gave."""
    parts = tuple(map(str, error.path))
    option = next((each for each in OPTIONS if tuple(each.field.split("."))[: len(parts)] == parts), None)
    return f"{option.name}: {error}" if option is not None and error.path else str(error)
