"""A job that is created again under its name, and goes on from its checkpoint: a failed one, or one on other GPUs.

What a job was given cannot change: its checks, its GPU time and its cost are those of its resources. So a job with
other GPUs is another job. Checkpoints belong to a namespace, a name and what defines the training, which GPUs do not.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError
from rich.console import Console

from finetune_api import API_VERSION, KIND
from finetune_api.base import Json
from finetune_api.explain import explain_errors
from finetune_api.job import FineTuneJob
from finetune_client.connection import Cluster
from finetune_client.errors import ClientError, Exit
from finetune_client.rows import Row
from finetune_client.terminal.screen import print_line
from finetune_client.terminal.text import clean

DELETION_SECONDS = 900
"""Seconds for which a job's end is waited for: a pod may take its whole grace period."""

SECONDS_BETWEEN_LOOKS = 1
APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


@dataclass(frozen=True)
class OtherGpus:
    """Other numbers of GPUs and nodes than a job had; None: the same."""

    gpus: int | None = None
    nodes: int | None = None

    @property
    def changes(self) -> Json:
        """Fields of `spec.resources`."""
        wanted = {"gpus": self.gpus, "nodes": self.nodes}
        return {name: value for name, value in wanted.items() if value is not None}


def retry_job(cluster: Cluster, out: Console, name: str, new_name: str | None, other: OtherGpus = OtherGpus()) -> str:
    """Run a failed job again as a new job of the same spec, on other GPUs if that is asked for; returns its name.

    The new job takes the old one's name and place, unless the user gives it another name, and then it begins anew
    beside the old one.
    """
    job = cluster.get_job(name)
    row = Row.of(job)
    if row.phase != "Failed":
        raise ClientError(
            f"job {row.name} has not failed (phase {row.phase or 'unknown'}): only a failed job is run again"
        )

    manifest = _manifest_of(job, new_name or name, other)
    if new_name is not None:
        cluster.create_job(manifest, dry_run=True)
        cluster.create_job(manifest)
        print_line(out, f"job {clean(new_name, 253)} is created with the spec of {row.name}; it begins at step 0")
        return new_name

    _create_again(cluster, job, manifest, f"failed with {row.reason}: {row.message}", out)
    return name


def resume_job_on(cluster: Cluster, out: Console, name: str, other: OtherGpus) -> None:
    """Let a suspended job go on with other GPUs."""
    job = cluster.get_job(name)
    row = Row.of(job)
    if row.phase != "Suspended":
        message = f"job {row.name} is not suspended (phase {row.phase or 'unknown'}): suspend it first, and wait for it"
        raise ClientError(message)

    manifest = _manifest_of(job, name, other)
    manifest["spec"] = manifest["spec"] | {"runPolicy": manifest["spec"].get("runPolicy", {}) | {"suspend": False}}
    asked = ", ".join(f"{field}: {value}" for field, value in other.changes.items())
    _create_again(cluster, job, manifest, f"gets other resources ({asked})", out)


def _create_again(cluster: Cluster, job: Json, manifest: Json, why: str, out: Console) -> None:
    """Deletes a job that has no pod that runs and creates it anew, as soon as the API server has agreed to such a job
    under a name that is free."""
    metadata, name = manifest["metadata"], Row.of(job).name
    uid = str(job["metadata"]["uid"])
    cluster.create_job(manifest | {"metadata": metadata | {"name": f"retry-{Row.of(job).uid}"}}, dry_run=True)

    saved = _save(manifest)
    print_line(out, f"job {name} {why}")
    cluster.delete_job(metadata["name"], uid, pods_first=False)
    try:
        _wait_until_gone(cluster, metadata["name"], uid)
        cluster.create_job(manifest)
    except (ClientError, KeyboardInterrupt) as error:
        said = error.message if isinstance(error, ClientError) else "interrupted"
        message = f"the job is deleted, but not created again: {said}; run `finetune submit {saved}` for that"
        raise ClientError(message) from None
    saved.unlink()
    print_line(out, f"job {name} is created again; it goes on from its last checkpoint if there is one")


def _manifest_of(job: Json, name: str, other: OtherGpus) -> Json:
    """Returns the manifest of a job under a name. Raises ClientError for GPUs that do not divide its steps."""
    metadata, spec = job["metadata"], job["spec"]
    if other.changes:
        spec = spec | {"resources": spec.get("resources", {}) | other.changes}

    annotations = {key: value for key, value in (metadata.get("annotations") or {}).items() if key != APPLIED}
    kept = {"labels": metadata.get("labels"), "annotations": annotations}
    manifest = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": metadata["namespace"]} | {k: v for k, v in kept.items() if v},
        "spec": spec,
    }

    # The API server's own message cannot name the nearest values.
    try:
        FineTuneJob.model_validate(manifest)
    except ValidationError as error:
        found = "; ".join(str(each) for each in explain_errors(error, manifest))
        raise ClientError(found, Exit.INVALID) from None
    return manifest


def _save(manifest: Json) -> Path:
    with tempfile.NamedTemporaryFile("w", prefix="finetune-retry-", suffix=".yaml", delete=False) as file:
        yaml.safe_dump(manifest, file)
    return Path(file.name)


def _wait_until_gone(cluster: Cluster, name: str, uid: str) -> None:
    deadline = time.monotonic() + DELETION_SECONDS
    while cluster.has_job(name, uid):
        if time.monotonic() > deadline:
            raise ClientError(f"it is still being deleted after {DELETION_SECONDS} s: a finalizer holds it")
        time.sleep(SECONDS_BETWEEN_LOOKS)
