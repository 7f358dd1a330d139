"""`finetune artifacts JOB`: list what a job made, or download it with every digest checked."""

import argparse
import logging
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.download import SUMS_NAME, download_artifacts, read_manifest
from finetune_trainer.artifacts.manifest import Manifest, ManifestArtifact
from finetune_trainer.cli.find_result import locate_result
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.logging_setup import configure_logging
from finetune_trainer.storage.object_store import ObjectStore

INCOMPLETE = 15


def add_artifacts_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "job", help="job.yaml, [namespace/]name in the cluster, s3://bucket/prefix/job/, or a folder with manifest.json"
    )
    parser.add_argument("--download", type=Path, metavar="DIR", help="download into this folder and check every digest")
    parser.add_argument(
        "--type", action="append", choices=[kind.value for kind in ArtifactType], help="only these; may be repeated"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="what `finetune run job.yaml --output DIR` wrote")
    parser.add_argument(
        "--credentials", type=Path, metavar="DIR", help="folder with AWS_ACCESS_KEY_ID and so on as files"
    )
    parser.add_argument("--endpoint-url", metavar="URL", help="S3 store that is not AWS (default: the job's)")
    parser.add_argument("--region", help="region of the store (default: the job's)")


def artifacts_here(arguments: argparse.Namespace) -> int:
    """List or download; returns the exit code."""
    configure_logging(logging.ERROR)
    console = Console(stderr=True, highlight=False)
    try:
        location = locate_result(arguments.job, arguments.results, arguments.endpoint_url, arguments.region)
        store = location.open(arguments.credentials)
        try:
            manifest = read_manifest(store)
            if location.spec_digest not in (None, manifest.spec_digest):
                console.print("note: this result was made by another version of the specification", markup=False)
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
    """Show the artifacts and whether their files are there, by size; says so in the exit code."""
    table = Table("type", "quantization", "files", "bytes", "sha256", "stored")
    complete = True
    for artifact in chosen:
        missing = sum(store.size(file.path) != file.bytes for file in artifact.files)
        complete = complete and not missing
        stored = f"{missing} missing" if missing else "complete"
        row = (f"{len(artifact.files)}", f"{artifact.bytes:,}", f"{artifact.sha256[:12]}…", stored)
        table.add_row(artifact.type, artifact.quantization or "", *row)
    console = Console(highlight=False)
    console.print(table)
    for artifact in chosen:
        console.print(f"{artifact.sha256}  {artifact.uri}", markup=False, soft_wrap=True)
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
