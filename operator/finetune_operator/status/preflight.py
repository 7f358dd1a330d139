"""`status.preflight` from preflight's pods and their last words (pure). Once its result is there, it never changes."""

from datetime import datetime
from typing import Any

from finetune_api.outcome import Outcome
from finetune_api.preflight import PreflightSummary
from finetune_api.progress import StageTimes
from finetune_api.status import PreflightStatus
from finetune_api.vocabulary import PreflightResult, Stage
from finetune_operator.decide.failure import last_outcome
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.status.attempts import merge_attempts


def build_preflight_status(snapshot: Snapshot, result: PreflightResult | None) -> PreflightStatus | None:
    """What is known of preflight, whose result was seen just now if it is given; None for a job that has none."""
    last = snapshot.status.preflight
    if last is not None and last.result is not None:
        return last
    if last is None and snapshot.preflight is None:
        return None
    last = last or PreflightStatus()
    attempts = merge_attempts(last.attempts, snapshot.preflight_pods)
    begun = next((each.start_time for each in attempts if each.start_time), None)
    fields: dict[str, Any] = {
        "result": result,
        "job_name": snapshot.preflight.name if snapshot.preflight else last.job_name,
        "start_time": last.start_time or begun,
        "end_time": None if result is None else _end(snapshot),
        "attempts": attempts,
    }
    return last.model_copy(update=_summary(last_outcome(snapshot.of_preflight())) | fields)


def preflight_stage(preflight: PreflightStatus | None) -> tuple[StageTimes, ...]:
    """The checks as the job's first stage; empty before they began."""
    if preflight is None or preflight.start_time is None:
        return ()
    end = None if preflight.end_time is None else max(preflight.end_time, preflight.start_time)
    return (StageTimes(name=Stage.PREFLIGHT, start_time=preflight.start_time, end_time=end),)


def describe_preflight(preflight: PreflightStatus) -> str:
    """What was found, in a sentence."""
    facts = []
    if preflight.rows is not None:
        facts.append(f"{preflight.rows:,} rows ({preflight.bad_rows or 0:,} bad)")
    if preflight.tokens is not None:
        facts.append(f"{preflight.tokens.p50:,} tokens in the middle row, {preflight.tokens.max:,} in the longest")
    if preflight.steps is not None:
        facts.append(f"{preflight.steps:,} steps")
    if preflight.gpu_memory_bytes is not None:
        facts.append(f"about {preflight.gpu_memory_bytes / 2**30:.1f} GiB of GPU memory")
    if preflight.gpu_hours is not None:
        facts.append(f"about {preflight.gpu_hours:.2g} GPU hours")
    where = f"; report: {preflight.report_uri}" if preflight.report_uri else ""
    return f"model, data and output are usable: {', '.join(facts) or 'nothing was reported'}{where}"


def _summary(outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None or outcome.preflight is None:
        return {}
    return {name: getattr(outcome.preflight, name) for name in PreflightSummary.model_fields}


def _end(snapshot: Snapshot) -> datetime:
    pod = snapshot.of_preflight().newest_pod
    ended = pod.termination.finished if pod and pod.termination else None
    return ended or snapshot.now
