"""`finetune artifacts`: lists what a job made, or downloads it with every digest checked."""

import argparse
import logging
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from finetune_trainer.artifacts.download import SUMS_NAME, download_artifacts, read_manifest
from finetune_trainer.artifacts.manifest import Manifest, ManifestArtifact
from finetune_trainer.cli.cluster_job import ClusterChoice
from finetune_trainer.cli.find_result import locate_result
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.logging_setup import configure_logging
from finetune_trainer.storage.object_store import ObjectStore

WIDE = 160
"""Columns of a listing at least: a cell that is cut into lines cannot be copied or found."""
INCOMPLETE = 15
"""Exit code of a listing in which files are missing (ExitCode.STORAGE)."""


def artifacts_here(arguments: argparse.Namespace) -> int:
    """Lists or downloads the artifacts of a job; returns the exit code."""
    configure_logging(logging.ERROR)
    console = Console(stderr=True, highlight=False)

    try:
        cluster = ClusterChoice(arguments.kubeconfig, arguments.context, arguments.namespace)
        location = locate_result(arguments.job, arguments.results, arguments.endpoint_url, arguments.region, cluster)
        if location.note is not None:
            console.print(f"note: {location.note}", markup=False, soft_wrap=True)
        store = location.open(arguments.credentials)
        try:
            manifest = read_manifest(store)
            if location.spec_digest not in (None, manifest.spec_digest):
                console.print("note: this result comes from another version of the manifest", markup=False)
            chosen = [each for each in manifest.artifacts if not arguments.type or each.type in arguments.type]
            if arguments.download is None:
                return _list(manifest, chosen, store)
            _download(chosen, store, arguments.download, console)
        finally:
            store.close()
    except TrainerError as error:
        console.print(error.message, markup=False, soft_wrap=True)
        return int(error.exit_code)
    return 0


def _list(manifest: Manifest, chosen: list[ManifestArtifact], store: ObjectStore) -> int:
    """Prints the artifacts with the loss of each that was judged, and whether all their files are stored, by size.

    Returns the exit code.
    """
    table = Table("type", "quantization", "loss", "improvement kept", "files", "bytes", "sha256", "stored")
    complete = True

    for artifact in chosen:
        # By size only: a listing of a bucket must not read gigabytes.
        missing = sum(store.size(file.path) != file.bytes for file in artifact.files)
        complete = complete and not missing
        stored = f"{missing} missing" if missing else "complete"
        row = (f"{len(artifact.files)}", f"{artifact.bytes:,}", f"{artifact.sha256[:12]}…", stored)
        loss = "" if artifact.loss is None else f"{artifact.loss:.4f}"
        kept = "" if artifact.improvement_kept is None else f"{artifact.improvement_kept:.0%}"
        table.add_row(artifact.type, artifact.quantization or "", loss, kept, *row)

    console = Console(highlight=False)
    console.width = max(console.width, WIDE)
    console.print(table)
    for artifact in chosen:
        console.print(f"{artifact.sha256}  {artifact.uri}", markup=False, soft_wrap=True)

    if (judgement := manifest.judgement) is not None:
        rows = f"{judgement.rows} {judgement.data.lower()} rows"
        console.print(f"loss on the same {rows}; the base has {judgement.base_loss:.4f}", soft_wrap=True)
        for warning in judgement.warnings:
            console.print(f"warning: {warning}", markup=False, soft_wrap=True)

    metrics = ", ".join(f"{name} {value:g}" for name, value in manifest.metrics.items())
    console.print(f"made {manifest.created:%Y-%m-%d %H:%M} UTC from {manifest.model_source}; {metrics}", soft_wrap=True)
    return 0 if complete else INCOMPLETE


def _download(chosen: list[ManifestArtifact], store: ObjectStore, target: Path, console: Console) -> None:
    target.mkdir(parents=True, exist_ok=True)
    total = sum(artifact.bytes for artifact in chosen)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("download", total=total)
        files = download_artifacts(store, chosen, target, lambda count: bar.update(task, advance=count))

    out = Console(highlight=False)
    for path in files:
        out.print(f"{path}", markup=False, soft_wrap=True)
    out.print(
        f"{len(files)} files verified; check them again with: cd {target} && sha256sum --check {SUMS_NAME}",
        soft_wrap=True,
    )
