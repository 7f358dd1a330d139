"""`finetune run`: runs a job on this machine as a pod would, with a progress bar and a table of its artifacts."""

import logging
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from finetune_api.failures import FAILURES
from finetune_api.job import FineTuneJob
from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import JobIdentity, RunConfig
from finetune_api.vocabulary import Stage
from finetune_trainer.artifacts.store import remove_uncommitted
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.logging_setup import configure_logging
from finetune_trainer.job.outcome import overdue
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal

MEGABYTE = 1e6
STOPPED_BY_PERSON = 130  # as shells have it for Ctrl-C
console = Console(stderr=True, highlight=False)


def run_here(job: FineTuneJob, output: Path | None, credentials: Path | None, *, verbose: bool) -> NoReturn:
    """Runs the job; ends the process with its exit code.

    `credentials` is a folder like a pod's mounted Secrets; None: boto3's own chain, and no Hugging Face token.
    """
    configure_logging(logging.INFO if verbose else logging.ERROR)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    identity = JobIdentity(namespace=job.metadata.namespace, name=job.metadata.name, uid=str(uuid.uuid4()))
    config = RunConfig.from_spec(identity, job.spec, progress=None)

    # Ctrl-C stops a run in order, like SIGTERM in a pod.
    stop_signal, progress = StopSignal(), ProgressTracker()
    stop_signal.listen(_answer)
    stop_signal.install()
    prefix = f"finetune-{job.metadata.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as work:
        settings = Settings(work=Path(work), attempt_id=identity.uid, credentials=credentials, output_folder=output)
        stop_signal.guard(lambda now: _stop(config, settings, progress, now=now))
        with _progress_bar(progress):
            outcome = run_job(config, settings, progress, stop_signal)

    stop_signal.conclude()
    show(outcome)
    stop_signal.exit(int(outcome.exit_code))


def _answer(presses: int) -> None:
    """Answers Ctrl-C at once, whatever the run is doing."""
    if presses == 1:
        console.print("stopping: a step is finished first, with a checkpoint; press Ctrl-C again to stop now")


def _stop(config: RunConfig, settings: Settings, progress: ProgressTracker, *, now: bool) -> int:
    """Ends a run in the middle of its work, and leaves none of its files behind; returns the exit code."""
    shutil.rmtree(settings.work, ignore_errors=True)
    if settings.output_folder is not None:
        remove_uncommitted(settings.output_folder / config.job.name, settings.attempt_id)

    outcome = overdue(progress)
    show(outcome)
    return STOPPED_BY_PERSON if now else int(outcome.exit_code)


def _progress_bar(progress: ProgressTracker) -> Progress:
    """A bar that follows `progress`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    bar = Progress(*columns, TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), console=console)
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
    """Prints the artifacts as a table, or the failure with what to change."""
    if outcome.result is Result.INTERRUPTED:
        kept = outcome.checkpoint_step or outcome.resumed_from_step
        how = "begin again" if kept is None else f"go on from step {kept}"
        console.print(f"{outcome.message}\n  run the same command to {how}", markup=False)
        return

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
