"""Changes of a job: submit, suspend, resume, cancel."""

from pathlib import Path

import yaml
from rich.console import Console

from finetune_api import API_VERSION, KIND
from finetune_api.base import Json
from finetune_api.job import read_document
from finetune_client.connection import Cluster
from finetune_client.errors import ClientError, Exit
from finetune_client.rows import ENDED, Row
from finetune_client.terminal.screen import print_line
from finetune_client.terminal.text import clean, find, word


def read_manifest(path: Path, namespace: str | None) -> Json:
    """Read a FineTuneJob from a file; `namespace` is that of -n. Raises ClientError."""
    try:
        document = read_document(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClientError(f"{path} cannot be read: {clean(error, 500)}", Exit.INVALID) from None

    if find(document, "kind") != KIND or find(document, "apiVersion") != API_VERSION:
        message = f"{path} is no FineTuneJob: it needs apiVersion {API_VERSION} and kind {KIND}"
        raise ClientError(message, Exit.INVALID)
    if not isinstance(find(document, "metadata", "name"), str):
        raise ClientError(f"{path} has no metadata.name: write the job's name there", Exit.INVALID)
    own = find(document, "metadata", "namespace")
    if namespace is not None and own not in (None, namespace):
        message = f"{path} is of namespace {clean(own, 253)}, and -n says {namespace}: leave one of them out"
        raise ClientError(message, Exit.USAGE)
    manifest: Json = document
    return manifest


def submit_job(cluster: Cluster, out: Console, manifest: Json, *, dry_run: bool) -> str:
    """Create a job after the API server has said that it would; returns the name."""
    name = clean(manifest["metadata"]["name"], 253)
    cluster.create_job(manifest, dry_run=True)
    if dry_run:
        print_line(out, f"job {name} would be created in namespace {cluster.namespace}; nothing was changed")
        return name

    cluster.create_job(manifest)
    place = f" -n {cluster.namespace}"
    print_line(out, f"job {name} is created in namespace {cluster.namespace}; next:")
    print_line(out, f"  finetune watch {name}{place}       progress and loss, until it ends")
    print_line(out, f"  finetune estimate {name}{place}    GPU memory and hours, as soon as it is checked")
    print_line(out, f"  finetune describe {name}{place}    what it waits for, or why it failed")
    return name


def set_suspended(cluster: Cluster, out: Console, name: str, *, suspended: bool) -> None:
    """Suspend a job, or let it go on. A job that has ended stays as it is."""
    job = cluster.get_job(name)
    row = Row.of(job)
    if row.phase in ENDED:
        raise ClientError(f"job {row.name} has ended ({row.phase}): it cannot be suspended or resumed")
    if bool(find(job, "spec", "runPolicy", "suspend")) is suspended:
        print_line(
            out, f"job {row.name} is {'suspended' if suspended else 'not suspended'} already; nothing was changed"
        )
        return

    cluster.patch_job(name, {"spec": {"runPolicy": {"suspend": suspended}}})
    said = (
        f"is being suspended, with a checkpoint of what it has trained; `finetune resume {row.name}` lets it go on"
        if suspended
        else "goes on, from its last checkpoint if there is one"
    )
    print_line(out, f"job {row.name} {said}")


def cancel_job(cluster: Cluster, out: Console, name: str) -> None:
    """Delete a job with its pods. What lies in S3 stays, checkpoints too."""
    job = cluster.get_job(name)
    row = Row.of(job)
    cluster.delete_job(name, str(job["metadata"]["uid"]), pods_first=True)
    kept = word(job, "status", "resultLocation")
    print_line(out, f"job {row.name} is cancelled: its pods end and the job is deleted")
    print_line(
        out,
        (f"what lies in {kept} stays; " if kept else "")
        + "a job of the same name and manifest goes on from its last checkpoint",
    )
