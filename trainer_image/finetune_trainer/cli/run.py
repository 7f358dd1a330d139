"""`finetune run`: runs a job on this machine as a pod would, with a live view and a table of its artifacts."""

import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from finetune_api.job import FineTuneJob
from finetune_api.judgement import Judgement
from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import JobIdentity, RunConfig
from finetune_api.spec.location import attempt_name
from finetune_api.vocabulary import Stage
from finetune_trainer.artifacts.store import remove_uncommitted
from finetune_trainer.cli.live.follow import follow
from finetune_trainer.cli.local_hints import local_hint
from finetune_trainer.cli.local_result import link_newest, next_commands, shown_path
from finetune_trainer.cli.machine import let_gpu_memory_grow
from finetune_trainer.cli.manifest.sources import shorten_source
from finetune_trainer.cli.pod import run_job
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.logging_setup import configure_screen_logging
from finetune_trainer.job.outcome import failed, overdue
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import CPU_RANKS, LOCAL_ATTEMPT, LOCAL_HUB_RETRIES, Settings
from finetune_trainer.job.stop_signal import StopSignal

STOPPED_BY_PERSON = 130  # as shells have it for Ctrl-C
WIDER_THAN_PATHS = 4096  # columns
console = Console(stderr=True, highlight=False)


def run_here(job: FineTuneJob, output: Path | None, credentials: Path | None, *, verbose: bool) -> NoReturn:
    """Runs the job; ends the process with its exit code.

    `credentials` is a folder like a pod's mounted Secrets; None: boto3's own chain, and no Hugging Face token.
    """
    configure_screen_logging(_say, verbose=verbose)
    let_gpu_memory_grow()
    identity = JobIdentity(namespace=job.metadata.namespace, name=job.metadata.name, uid=str(uuid.uuid4()))
    config = RunConfig.from_spec(identity, job.spec, progress=None)

    # Ctrl-C stops a run in order, like SIGTERM in a pod.
    stop_signal, progress = StopSignal(), ProgressTracker()
    stop_signal.listen(lambda presses: _answer(presses, progress))
    stop_signal.install()
    prefix = f".finetune-{job.metadata.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=_beside(output), ignore_cleanup_errors=True) as work:
        settings = Settings(
            work=Path(work),
            attempt_id=LOCAL_ATTEMPT,
            credentials=credentials,
            output_folder=output,
            hub_retries=LOCAL_HUB_RETRIES,
            cpu_ranks=int(os.environ.get(CPU_RANKS, "1")),
        )

        def end(error: TrainerError) -> None:
            stop_signal.end_stalled(lambda: _end_failed(error, settings, progress))

        stop_signal.guard(lambda now: _stop(config, settings, progress, now=now))
        title = f"{config.job.name}: {shorten_source(config.model.source)} on {shorten_source(config.dataset.source)}"
        with follow(progress, console, title, settings.work, is_plain=verbose):
            outcome = run_job(config, settings, progress, stop_signal, end)

    stop_signal.conclude()
    show(outcome, None if output is None else output / config.job.name)
    stop_signal.exit(int(outcome.exit_code))


def _beside(output: Path | None) -> Path | None:
    """The folder to work in: on the disk of the results, which then need not be copied; None for the system's own."""
    if output is None:
        return None
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # the store says what is wrong with it
    return output if os.access(output, os.W_OK) else None


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _answer(presses: int, progress: ProgressTracker) -> None:
    """Answers the first Ctrl-C at once, whatever the run is doing."""
    if presses > 1:
        return
    first = " after this step, with a checkpoint" if progress.current_stage is Stage.TRAINING else ""
    _say(f"stopping{first}; press Ctrl-C again to stop now")


def _end_failed(error: TrainerError, settings: Settings, progress: ProgressTracker) -> int:
    """Shows the failure of a run whose main thread waits for ever; returns the exit code."""
    outcome = failed(error, progress, settings.work)
    shutil.rmtree(settings.work, ignore_errors=True)
    show(outcome)
    return int(outcome.exit_code)


def _stop(config: RunConfig, settings: Settings, progress: ProgressTracker, *, now: bool) -> int:
    """Ends a run in the middle of its work, and leaves nothing behind but a result that is complete; returns the exit
    code."""
    shutil.rmtree(settings.work, ignore_errors=True)
    if settings.output_folder is not None:
        folder, attempt = settings.output_folder / config.job.name, attempt_name(config.job.uid, settings.attempt_id)
        if remove_uncommitted(folder, attempt):
            _say(f"the result was finished before that: it is complete in {folder}")
            return STOPPED_BY_PERSON if now else 0

    outcome = overdue(progress)
    show(outcome)
    return STOPPED_BY_PERSON if now else int(outcome.exit_code)


def show(outcome: Outcome, folder: Path | None = None) -> None:
    """Prints the artifacts as a table, or the failure with what to change.

    `folder` is the job's local folder, whose links then show the newest result.
    """
    if outcome.result is Result.INTERRUPTED:
        kept = outcome.checkpoint_step or outcome.resumed_from_step
        how = "begin again" if kept is None else f"go on from step {kept}"
        console.print(f"{outcome.message}\n  run the same command to {how}", markup=False)
        return

    if outcome.result is not Result.SUCCEEDED:
        assert outcome.reason is not None
        console.print(f"[red]{outcome.reason}[/]", end=" ")
        console.print(outcome.message, markup=False, soft_wrap=True)  # it may hold a command to copy
        console.print(f"  {local_hint(outcome.reason)}", markup=False)
    if outcome.manifest_uri is not None:
        _show_artifacts(outcome, folder)


def _show_artifacts(outcome: Outcome, folder: Path | None) -> None:
    """Prints what is published, which may be something although an export failed."""
    paths = [artifact.uri for artifact in outcome.artifacts]
    if folder is not None:
        attempt_id = paths[0].partition("/attempts/")[2].partition("/")[0]  # a reused result is of an earlier one
        link_newest(folder, attempt_id)
        paths = [shown_path(path, attempt_id) for path in paths]

    table = Table("type", "quantization", "loss", "bytes", "sha256", "where", box=box.SIMPLE_HEAD)
    for artifact, path in zip(outcome.artifacts, paths, strict=True):
        size, digest = f"{artifact.bytes:,}", artifact.sha256[:12] + "…"
        loss = "" if artifact.loss is None else f"{artifact.loss:.4f}"
        table.add_row(artifact.type, artifact.quantization or "", loss, size, digest, path)
    # Wider than any path: one that is cut into lines cannot be copied.
    Console(highlight=False, width=WIDER_THAN_PATHS).print(table)
    _show_judgement(outcome.judgement)

    if outcome.hub_url is not None:
        console.print(f"hub: {outcome.hub_url}", markup=False, soft_wrap=True)
    console.print(f"manifest: {outcome.manifest_uri}" + ("  (it was there already)" if outcome.reused else ""))
    if folder is not None:
        for number, command in enumerate(next_commands(folder, folder.name, outcome.artifacts, paths)):
            console.print(f"{'next:' if number == 0 else '     '} {command}", markup=False, soft_wrap=True)


def _show_judgement(judgement: Judgement | None) -> None:
    """Prints what the losses in the table are measured on, and what published weights lost."""
    if judgement is None:
        return
    rows = f"{judgement.rows} {judgement.data.lower()} rows"
    console.print(f"loss on the same {rows}; the base has {judgement.base_loss:.4f}")
    for warning in judgement.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
