"""`finetune`: what a user runs on their own machine.

finetune run job.yaml [--output FOLDER]     the same manifest as on a cluster: progress bar, then a table of
artifacts
finetune validate job.yaml [--output FOLDER]  every error of the manifest at once, then those of model, data and output
finetune export --base SRC --output DIR ...   merge an adapter and write GGUF files: no cluster, no training
finetune artifacts JOB [--download DIR]       what a job made; downloads are checked against the manifest's digests
"""

import argparse
import logging
import os
import sys
import tempfile
import uuid
from pathlib import Path

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from finetune_api.failures import FAILURES
from finetune_api.job import FineTuneJob, load_manifest
from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import JobIdentity, RunConfig
from finetune_api.vocabulary import Stage
from finetune_trainer.cli.artifacts import add_artifacts_arguments, artifacts_here
from finetune_trainer.cli.export_arguments import InvalidArgumentsError, add_export_arguments, check_export_arguments
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.logging_setup import configure_logging
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal

INVALID = 10
MEGABYTE = 1e6
console = Console(stderr=True, highlight=False)


def main() -> None:
    """Console script."""
    arguments, unknown = _parse(sys.argv[1:])
    if arguments.verb == "export":
        sys.exit(_export(arguments, unknown))
    if arguments.verb == "artifacts":
        sys.exit(artifacts_here(arguments))
    try:
        job = load_manifest(arguments.manifest.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        for line in explain_errors(error):
            console.print(f"{arguments.manifest}: {line}", markup=False, soft_wrap=True)
        sys.exit(INVALID)
    if arguments.verb == "validate":
        if arguments.manifest_only:
            console.print(f"{arguments.manifest}: valid")
            return
        sys.exit(validate(job, arguments.output, arguments.credentials))
    sys.exit(run(job, arguments.output, arguments.credentials, verbose=arguments.verbose))


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the words that no verb knows: `export` says them with its other errors."""
    parser = argparse.ArgumentParser(prog="finetune", description="Fine-tune a model as a FineTuneJob describes it.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    validate_parser = verbs.add_parser("validate", help="check a manifest, its model, data and output")
    run_parser = verbs.add_parser("run", help="run a manifest on this machine, without a cluster")
    for verb in (validate_parser, run_parser):
        verb.add_argument("manifest", type=Path, help="YAML file with one FineTuneJob")
        verb.add_argument("--output", type=Path, help="folder for the results (default: spec.output.s3)")
        verb.add_argument(
            "--credentials",
            type=Path,
            metavar="DIR",
            help="folder with output/, model/, dataset/ and hub/, each like a mounted Secret (default: boto3's chain)",
        )
    validate_parser.add_argument("--manifest-only", action="store_true", help="fetch nothing, write nothing")
    run_parser.add_argument("--verbose", action="store_true", help="show the trainer's log")
    add_export_arguments(verbs.add_parser("export", help="merge an adapter and write GGUF files", allow_abbrev=False))
    add_artifacts_arguments(verbs.add_parser("artifacts", help="list or download what a job made"))
    arguments, unknown = parser.parse_known_args(words)
    if unknown and arguments.verb != "export":
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments, unknown


def _export(arguments: argparse.Namespace, unknown: list[str]) -> int:
    try:
        checked = check_export_arguments(arguments, unknown)
    except InvalidArgumentsError as error:
        for line in error.errors:
            console.print(line, markup=False, soft_wrap=True)
        return INVALID
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from finetune_trainer.cli.export import export_here  # imports torch

    return export_here(checked)


def explain_errors(error: Exception) -> list[str]:
    """One line per error: the field's path, what was found, what is wrong with it."""
    if not isinstance(error, ValidationError):
        return [str(error)]
    lines = []
    for entry in error.errors(include_url=False):
        path = ".".join(str(part) for part in entry["loc"])
        found = entry["input"] if isinstance(entry["input"], str | int | float | bool) else None
        text = entry["msg"].removeprefix("Value error, ")
        lines.append(f"{path}: found {found!r}: {text}" if found is not None else f"{path}: {text}")
    return lines


def validate(job: FineTuneJob, output: Path | None, credentials: Path | None) -> int:
    """Preflight here, on the CPU; returns the exit code."""
    from finetune_trainer.preflight.process_memory import block_torch_import

    block_torch_import()
    from finetune_trainer.cli.preflight import preflight_here

    configure_logging(logging.ERROR)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    identity = JobIdentity(namespace=job.metadata.namespace, name=job.metadata.name, uid=str(uuid.uuid4()))
    with tempfile.TemporaryDirectory(prefix=f"finetune-{job.metadata.name}-") as work:
        settings = Settings(work=Path(work), attempt_id=identity.uid, credentials=credentials, output_folder=output)
        return preflight_here(RunConfig.from_spec(identity, job.spec, progress=None), settings)


def run(job: FineTuneJob, output: Path | None, credentials: Path | None, *, verbose: bool) -> int:
    """Run the job here; returns the exit code. Credentials come from a folder like a pod's, else from boto3's chain (no
    HF token then)."""
    configure_logging(logging.INFO if verbose else logging.ERROR)
    identity = JobIdentity(namespace=job.metadata.namespace, name=job.metadata.name, uid=str(uuid.uuid4()))
    config = RunConfig.from_spec(identity, job.spec, progress=None)
    stop_signal = StopSignal()
    stop_signal.install()
    progress = ProgressTracker()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory(prefix=f"finetune-{job.metadata.name}-") as work:
        settings = Settings(work=Path(work), attempt_id=identity.uid, credentials=credentials, output_folder=output)
        with _progress_bar(progress):
            outcome = run_job(config, settings, progress, stop_signal)
    show(outcome)
    return int(outcome.exit_code)


def _progress_bar(progress: ProgressTracker) -> ProgressBar:
    """A bar that follows `progress`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    bar = ProgressBar(*columns, TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), console=console)
    task = bar.add_task("starting", total=100, detail="")

    def follow(_: bool) -> None:
        detail = _upload_detail(progress) if progress.current_stage is Stage.UPLOADING else _training_detail(progress)
        bar.update(task, completed=progress.percent(), description=str(progress.current_stage), detail=detail)

    progress.listen(follow)
    return bar


def _training_detail(progress: ProgressTracker) -> str:
    step, total, loss = (progress.value(name) for name in ("step", "total_steps", "loss"))
    detail = f"step {step}/{total}" if step is not None else ""
    return detail + (f"  loss {loss:.4f}" if loss is not None else "")


def _upload_detail(progress: ProgressTracker) -> str:
    names = ("uploaded_bytes", "upload_total_bytes", "upload_bytes_per_second")
    done, total, rate = (progress.value(name) or 0 for name in names)
    return f"{done / MEGABYTE:.1f} of {total / MEGABYTE:.1f} MB  {rate / MEGABYTE:.1f} MB/s"


def show(outcome: Outcome) -> None:
    """The result as a table, or the failure with what to change."""
    if outcome.result is not Result.SUCCEEDED:
        assert outcome.reason is not None
        console.print(f"[red]{outcome.reason}[/]", end=" ")
        console.print(outcome.message, markup=False)
        console.print(f"  {FAILURES[outcome.reason].hint}", markup=False)
        return
    table = Table("type", "quantization", "bytes", "sha256")
    table.add_column("where", overflow="fold")
    for artifact in outcome.artifacts:
        size, digest = f"{artifact.bytes:,}", artifact.sha256[:12] + "…"
        table.add_row(artifact.type, artifact.quantization or "", size, digest, artifact.uri)
    Console(highlight=False).print(table)
    if outcome.hub_url is not None:
        console.print(f"hub: {outcome.hub_url}", markup=False, soft_wrap=True)
    console.print(f"manifest: {outcome.manifest_uri}" + ("  (it was there already)" if outcome.reused else ""))
