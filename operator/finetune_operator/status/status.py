"""The status of a FineTuneJob, from a snapshot and the decision about it (pure).

Whatever the last status says is carried over if nothing newer is known, so a pod or a report that is gone loses
nothing.
"""

from dataclasses import replace
from datetime import datetime
from typing import Any

from finetune_api.outcome import Outcome
from finetune_api.progress import StageTimes
from finetune_api.status import FineTuneJobStatus, PreflightStatus, ProgressStatus
from finetune_api.vocabulary import Phase, Stage
from finetune_operator.decide.decision import Decision
from finetune_operator.observe.snapshot import AnySnapshot
from finetune_operator.status.attempts import count_retries, merge_attempts
from finetune_operator.status.conditions import build_conditions
from finetune_operator.status.preflight import build_preflight_status, preflight_stage
from finetune_operator.status.progress import add_speed_of_each, merge_outcome, merge_report
from finetune_operator.status.usage import build_usage, count_held_seconds, without_time


def build_status(snapshot: AnySnapshot, decision: Decision) -> FineTuneJobStatus:
    """Builds the whole status. It equals the last one, except for `activeSeconds`, if there is nothing new to say.

    A job that is over stays over, whatever the decision says.
    """
    last, training, job = snapshot.status, snapshot.training, snapshot.current_run.job
    generation = snapshot.metadata.generation
    if last.phase is not None and last.phase.is_terminal:
        return _observe_generation(last, generation)

    attempts = count_held_seconds(snapshot, merge_attempts(last.attempts, training.pods, decision.given_up_pod))
    is_new_pod = bool(attempts and last.attempts) and last.attempts[-1].uid != attempts[-1].uid
    begun = next((each.start_time for each in attempts if each.start_time), None)

    preflight = build_preflight_status(snapshot, decision.preflight)
    stages = (*preflight_stage(preflight), *_stages(snapshot, decision))
    newest = stages[-1].name if stages else None
    conditions = build_conditions(decision, newest, last.conditions, generation, snapshot.now)

    fields: dict[str, Any] = {  # Any: field values of the model, which validates them
        "observed_generation": generation,
        "phase": decision.phase,
        "reason": decision.reason,
        "conditions": conditions,
        "preflight": preflight,
        "progress": _progress(snapshot, decision, is_new_pod=is_new_pod),
        "stages": stages,
        "attempts": attempts,
        "retries": count_retries(attempts, last.retries or 0) if attempts else None,
        "failure": decision.failure,
        "result_location": snapshot.result_location,
        "job_name": training.job.name if training.job else last.job_name,
        "start_time": last.start_time or begun,
        "completion_time": _completion_time(snapshot) if decision.phase.is_terminal else None,
        # Both runs count, because activeDeadlineSeconds limits them together.
        "active_seconds": job.active_seconds_at(snapshot.now) if job else last.active_seconds,
    }
    if is_new_pod:
        fields["memory"] = None  # another GPU may have another plan

    # The result comes last: what the outcome says overrules every report.
    status = last.model_copy(update=fields | _reported(snapshot, decision.outcome) | _result(decision))
    return status.model_copy(update={"usage": build_usage(snapshot, status)})


def reduce_status(snapshot: AnySnapshot, decision: Decision, refusal: str) -> FineTuneJobStatus:
    """Builds what is written instead of a status that the API server refused: only what the operator found out itself.

    `refusal`: what was refused. A status that is over never changes again, so it keeps its end.
    """
    message = f"{decision.message} (the rest of the status was refused: {refusal})"
    bare = replace(snapshot, training=replace(snapshot.training, report=None), status=_own_part(snapshot.status))
    return build_status(bare, replace(decision, message=message, outcome=None))


def _own_part(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Leaves out all that pods have said."""
    own = ("conditions", "attempts", "retries", "job_name", "start_time", "active_seconds", "result_location", "usage")
    result = status.preflight.result if status.preflight else None
    kept: dict[str, Any] = {name: getattr(status, name) for name in own}
    return FineTuneJobStatus(preflight=PreflightStatus(result=result) if result else None, **kept)


def has_changed(old: FineTuneJobStatus, new: FineTuneJobStatus) -> bool:
    """True if the new status is worth a write. Time that passes is not: it is written with the next change."""
    return without_time(old) != without_time(new)


def current_stage(status: FineTuneJobStatus) -> Stage | None:
    """Returns the newest stage in a status."""
    return status.stages[-1].name if status.stages else None


def _observe_generation(last: FineTuneJobStatus, generation: int) -> FineTuneJobStatus:
    """Notes the newest generation in a terminal status, which otherwise never changes."""
    # Every terminal status of ours has a generation: one without was read in part, and the rest must not be lost.
    if last.observed_generation is None:
        return last

    conditions = tuple(each.model_copy(update={"observed_generation": generation}) for each in last.conditions)
    return last.model_copy(update={"observed_generation": generation, "conditions": conditions})


def _progress(snapshot: AnySnapshot, decision: Decision, *, is_new_pod: bool) -> ProgressStatus | None:
    progress = snapshot.status.progress
    if progress is not None and is_new_pod:
        progress = progress.model_copy(update={"sequence": None})  # sequence numbers rise within one pod

    if snapshot.training.report is not None:
        report = snapshot.training.report
        resolved = report.report.finetune.resolved or snapshot.status.resolved
        progress = add_speed_of_each(merge_report(progress, report), resolved)
    if decision.outcome is not None:
        progress = merge_outcome(progress, decision.outcome)

    # A job that is over needs no estimate, and only success is 100 %.
    if decision.phase.is_terminal and progress is not None:
        progress = progress.model_copy(update={"eta": None, "eta_seconds": None})
    if decision.phase is Phase.SUCCEEDED:
        progress = (progress or ProgressStatus()).model_copy(update={"percent": 100, "completion": "100%"})
    return progress


def _stages(snapshot: AnySnapshot, decision: Decision) -> tuple[StageTimes, ...]:
    """The trainer's stages as it reported them. When the job is over, every stage has an end."""
    report, ended = snapshot.training.report, snapshot.training.end_time
    reported = report.report.finetune.stages if report else ()
    stages = tuple(stage for stage in reported or snapshot.status.stages if stage.name is not Stage.PREFLIGHT)
    if not decision.phase.is_terminal or ended is None:
        return stages
    return tuple(_close(stage, ended) for stage in stages)


def _close(stage: StageTimes, ended: datetime) -> StageTimes:
    if stage.end_time is not None:
        return stage
    # Clocks may differ: a stage never ends before it starts.
    return stage.model_copy(update={"end_time": max(ended, stage.start_time)})


def _completion_time(snapshot: AnySnapshot) -> datetime:
    """The end of the newest pod, or now for a job that no pod has ended."""
    run = snapshot.training if snapshot.training.pods else snapshot.preflight
    is_its_end = run.has_exited_with_0 or (run.job is not None and run.job.is_over)
    return (run.end_time if is_its_end else None) or snapshot.now


def _reported(snapshot: AnySnapshot, outcome: Outcome | None) -> dict[str, Any]:
    """Status fields, beside progress, that the trainer's report or its outcome fills; the outcome is newer."""
    report = snapshot.training.report
    run = report.report.finetune if report else None
    fields: dict[str, Any] = {}

    if run is not None and run.resolved is not None:
        fields["resolved"] = run.resolved
    if (step := _late_checkpoint(snapshot)) is not None:
        fields["checkpoint_step"] = step
    for source in (run, outcome):
        for name in ("checkpoint_step", "resumed_from_step", "memory"):
            if source is not None and getattr(source, name) is not None:
                fields[name] = getattr(source, name)

    return fields


def _late_checkpoint(snapshot: AnySnapshot) -> int | None:
    """Step of the newest checkpoint, as an earlier pod says whose end is new: a pod that is stopped may be followed by
    another before anybody has looked at it."""
    known = {attempt.uid for attempt in snapshot.status.attempts if attempt.exit_code is not None}
    ended = (pod.termination for pod in snapshot.training.pods[:-1] if pod.uid not in known)
    said = (end.outcome() for end in ended if end is not None)
    steps = [outcome.checkpoint_step for outcome in said if outcome and outcome.checkpoint_step is not None]
    return steps[-1] if steps else None


def _result(decision: Decision) -> dict[str, Any]:
    outcome = decision.outcome
    # A job that failed may have published all the same: everything but an export.
    if outcome is None or (decision.phase is not Phase.SUCCEEDED and outcome.manifest_uri is None):
        return {}
    return {
        name: getattr(outcome, name)
        for name in ("artifacts", "failed_exports", "judgement", "manifest_uri", "hub_url", "reused")
    }
