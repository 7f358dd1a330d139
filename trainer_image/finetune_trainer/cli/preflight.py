"""`finetune-trainer preflight` in a pod, and `finetune validate` on a user's machine."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from finetune_api.failures import FAILURES, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.preflight import MAX_WARNING_CHARACTERS, MAX_WARNINGS, PreflightSummary, TokenLengths
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Stage
from finetune_trainer.cli.local_hints import local_hint
from finetune_trainer.errors import InterruptedRunError, TrainerError
from finetune_trainer.job.logging_setup import configure_pod_logging
from finetune_trainer.job.outcome import failed, write_outcome
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings, load_config
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.preflight.report import Report
from finetune_trainer.preflight.reuse import find_result
from finetune_trainer.preflight.table import to_sentence, to_table
from finetune_trainer.sources.authorities import trust_authorities
from finetune_trainer.sources.hub import restrict_hub

log = logging.getLogger(__name__)


def preflight_attempt(settings: Settings, stop_signal: StopSignal) -> int:
    """Checks the mounted job and writes its outcome; returns the exit code."""
    assert settings.termination_log is not None
    termination_log = settings.termination_log
    stop_signal.guard(lambda _: write_outcome(_interrupted(), termination_log))

    try:
        config = load_config(settings)
        configure_pod_logging(config, settings.attempt_id)
        trust_authorities(settings.ca_bundle, settings.work)
        if config.endpoints is not None:
            restrict_hub(config.endpoints)
        outcome = find_result(config, settings) or _check(config, settings)
    except BaseException as error:  # signals and defects included: whatever happens, there is an outcome
        outcome = _failed(error)
        known = isinstance(error, TrainerError)
        log.error("%s: %s", outcome.reason, outcome.message, exc_info=None if known else error)

    stop_signal.conclude()
    return write_outcome(outcome, termination_log)


def _interrupted() -> Outcome:
    return _failed(InterruptedRunError("stopped in the middle of the checks"))


def _failed(error: BaseException) -> Outcome:
    return failed(error, ProgressTracker()).model_copy(update={"stage": Stage.PREFLIGHT})


def _check(config: RunConfig, settings: Settings) -> Outcome:
    report, written = run_preflight(config, settings)  # written: URIs of the report's files
    show(report, written)
    return to_outcome(report, written)


def preflight_here(config: RunConfig, settings: Settings) -> int:
    """Checks a job on this machine; returns the exit code."""
    try:
        report, written = run_preflight(config, settings)
    except TrainerError as error:  # such as an upload that fails although the probe succeeded
        Console(stderr=True, highlight=False).print(f"{error.reason}: {error.message}", markup=False)
        return int(error.exit_code)
    show(report, written, local_hint)
    return int(report.exit_code())


def to_outcome(report: Report, written: tuple[str, ...]) -> Outcome:
    """Returns the termination message for a report whose files are at the URIs `written`."""
    reason = report.reason()
    return Outcome(
        result=Result.SUCCEEDED if reason is None else Result.FAILED,
        reason=reason,
        message=to_sentence(report),
        exit_code=report.exit_code(),
        stage=Stage.PREFLIGHT,
        preflight=summarize(report, written[0] if written else None),
        finished=datetime.now(UTC),
    )


def summarize(report: Report, uri: str | None) -> PreflightSummary:
    """Returns the summary of the report for the job's status; the report itself is at `uri`."""
    rows, tokens, gpu, warnings = report.rows, report.tokens, report.gpu, report.warnings()
    fields: dict[str, Any] = {"errors": report.error_count(), "steps": report.optimizer_steps, "report_uri": uri}

    if rows is not None:
        fields |= {"rows": rows.total, "bad_rows": rows.bad, "duplicate_rows": rows.duplicates}
    if tokens is not None:
        fields |= {
            "tokens": TokenLengths(p50=tokens.p50, p95=tokens.p95, max=tokens.max),
            "truncated_share": round(tokens.truncated_share, 4),
            "supervised_share": round(tokens.supervised_share, 4),
        }
    if gpu is not None:
        fields |= {
            "gpu": gpu.name,
            "gpu_memory_bytes": gpu.peak_bytes,
            "smallest_gpu_memory_bytes": gpu.smallest_bytes,
            "gpu_hours": round(gpu.hours * gpu.gpus, 3) if gpu.hours is not None else None,
        }

    shown = [f"{warning.location}: {warning.message}" for warning in warnings[:MAX_WARNINGS]]
    fields |= {"warnings": tuple(_shorten(text) for text in shown), "warning_count": len(warnings)}
    return PreflightSummary(**fields)


def _shorten(text: str) -> str:
    """The text as the status can hold it; what is cut is in the report.

    Counted in bytes, since they share the 4,096 of the termination message.
    """
    encoded, mark = text.encode(), "…"
    if len(encoded) <= MAX_WARNING_CHARACTERS:
        return text
    return encoded[: MAX_WARNING_CHARACTERS - len(mark.encode())].decode(errors="ignore") + mark


def _hint(reason: FailureReason) -> str:
    return FAILURES[reason].hint


def show(report: Report, written: tuple[str, ...], hint_of: Callable[[FailureReason], str] = _hint) -> None:
    """Prints the table, what to change, and where the report is."""
    console = Console(highlight=False)
    console.print(to_table(report))
    if (reason := report.reason()) is not None:
        console.print(f"{reason}: {hint_of(reason)}", markup=False)
    for uri in written:
        console.print(f"report: {uri}", markup=False, soft_wrap=True)
