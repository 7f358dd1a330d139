"""`status.preflight`, from preflight's pods and their outcomes (pure). It never changes once it has a result."""

from typing import Any

from finetune_api.outcome import Outcome
from finetune_api.preflight import PreflightSummary
from finetune_api.progress import StageTimes
from finetune_api.status import PreflightStatus
from finetune_api.vocabulary import PreflightResult, Stage
from finetune_operator.observe.snapshot import AnySnapshot
from finetune_operator.status.attempts import merge_attempts


def build_preflight_status(snapshot: AnySnapshot, result: PreflightResult | None) -> PreflightStatus | None:
    """Builds `status.preflight`; None for a job without preflight. `result`: given if this snapshot is the first that
    shows it."""
    last, run = snapshot.status.preflight, snapshot.preflight
    if last is not None and last.result is not None:
        return last
    if last is None and run.job is None:
        return None

    last = last or PreflightStatus()
    attempts = merge_attempts(last.attempts, run.pods)

    # The first pod's start counts, though a later one may bring the result.
    begun = next((each.start_time for each in attempts if each.start_time), None)
    fields: dict[str, Any] = {
        "result": result,
        "job_name": run.job.name if run.job else last.job_name,
        "start_time": last.start_time or begun,
        "end_time": None if result is None else run.end_time or snapshot.now,
        "attempts": attempts,
    }
    return last.model_copy(update=_summary(run.outcome) | fields)


def preflight_stage(preflight: PreflightStatus | None) -> tuple[StageTimes, ...]:
    """Returns preflight as the job's first stage; empty before it began."""
    if preflight is None or preflight.start_time is None:
        return ()

    # Clocks of nodes differ: an end never lies before its beginning.
    end = None if preflight.end_time is None else max(preflight.end_time, preflight.start_time)
    return (StageTimes(name=Stage.PREFLIGHT, start_time=preflight.start_time, end_time=end),)


def describe_preflight(preflight: PreflightStatus) -> str:
    """Says in a sentence what preflight found."""
    facts = []
    if preflight.rows is not None:
        facts.append(f"{preflight.rows:,} rows ({preflight.bad_rows or 0:,} bad)")
    if preflight.tokens is not None:
        facts.append(f"{preflight.tokens.p50:,} tokens in the median row, {preflight.tokens.max:,} in the longest")
    if preflight.steps is not None:
        facts.append(f"{preflight.steps:,} steps")
    if preflight.gpu_memory_bytes is not None:
        facts.append(f"about {preflight.gpu_memory_bytes / 2**30:.1f} GiB of GPU memory")
    if preflight.gpu_hours is not None:
        facts.append(f"about {preflight.gpu_hours:.2g} GPU hours")

    where = f"; report: {preflight.report_uri}" if preflight.report_uri else ""
    return f"model, dataset and output are usable: {', '.join(facts) or 'nothing was reported'}{where}"


def _summary(outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None or outcome.preflight is None:
        return {}
    return {name: getattr(outcome.preflight, name) for name in PreflightSummary.model_fields}
