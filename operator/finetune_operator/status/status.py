"""The status of a FineTuneJob, from one observation and the decision about it (pure).

What the last status said is carried over where nothing newer is known, so a pod or a report that has gone loses
nothing.
"""

from datetime import datetime
from typing import Any

from finetune_api.outcome import Outcome
from finetune_api.progress import StageTimes
from finetune_api.status import FineTuneJobStatus, ProgressStatus
from finetune_api.vocabulary import Phase, Stage
from finetune_operator.decide.decision import Decision
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.status.attempts import count_retries, merge_attempts
from finetune_operator.status.conditions import build_conditions
from finetune_operator.status.preflight import build_preflight_status, preflight_stage
from finetune_operator.status.progress import merge_outcome, merge_report


def build_status(snapshot: Snapshot, decision: Decision) -> FineTuneJobStatus:
    """The whole status. Equal to the last one (times of running apart) if there is nothing new to say."""
    last = snapshot.status
    if last.phase is not None and last.phase.is_terminal:
        return _answer_generation(last, snapshot.metadata.generation)
    attempts = merge_attempts(last.attempts, snapshot.pods)
    is_new_pod = bool(attempts and last.attempts) and last.attempts[-1].uid != attempts[-1].uid
    progress = _progress(snapshot, decision, is_new_pod=is_new_pod)
    preflight = build_preflight_status(snapshot, decision.preflight)
    stages = (*preflight_stage(preflight), *_stages(snapshot, decision))
    newest = stages[-1].name if stages else None
    running = snapshot.child or snapshot.preflight
    fields: dict[str, Any] = {  # Any: field values of the model, which validates them
        "observed_generation": snapshot.metadata.generation,
        "phase": decision.phase,
        "conditions": build_conditions(
            decision, newest, preflight, last.conditions, snapshot.metadata.generation, snapshot.now
        ),
        "preflight": preflight,
        "progress": progress,
        "stages": stages,
        "attempts": attempts,
        "retries": count_retries(attempts, last.retries or 0) if attempts else None,
        "failure": decision.failure,
        "job_name": snapshot.child.name if snapshot.child else last.job_name,
        "start_time": last.start_time or next((each.start_time for each in attempts if each.start_time), None),
        "completion_time": _completion_time(snapshot) if decision.phase.is_terminal else None,
        "active_seconds": running.active_seconds_at(snapshot.now) if running else last.active_seconds,
    }
    if is_new_pod:
        fields["memory"] = None  # another GPU may have another plan
    return last.model_copy(update=fields | _reported(snapshot, decision.outcome) | _result(decision))


def has_changed(old: FineTuneJobStatus, new: FineTuneJobStatus) -> bool:
    """Whether a status is worth a write. Time that passes is not: it is brought along with the next change."""
    same_time = {"active_seconds": None}
    return old.model_copy(update=same_time) != new.model_copy(update=same_time)


def _answer_generation(last: FineTuneJobStatus, generation: int) -> FineTuneJobStatus:
    """A terminal status never changes, but says which generation of the spec it has seen."""
    conditions = tuple(each.model_copy(update={"observed_generation": generation}) for each in last.conditions)
    return last.model_copy(update={"observed_generation": generation, "conditions": conditions})


def _progress(snapshot: Snapshot, decision: Decision, *, is_new_pod: bool) -> ProgressStatus | None:
    progress = snapshot.status.progress
    if progress is not None and is_new_pod:
        progress = progress.model_copy(update={"sequence": None})  # numbers rise within one pod
    if snapshot.report is not None:
        progress = merge_report(progress, snapshot.report)
    if decision.outcome is not None:
        progress = merge_outcome(progress, decision.outcome)
    if decision.phase.is_terminal and progress is not None:
        progress = progress.model_copy(update={"eta": None, "eta_seconds": None})
    if decision.phase is Phase.SUCCEEDED:
        progress = (progress or ProgressStatus()).model_copy(update={"percent": 100, "completion": "100%"})
    return progress


def _stages(snapshot: Snapshot, decision: Decision) -> tuple[StageTimes, ...]:
    """Stages as the trainer reported them; a run that has ended leaves none open."""
    reported = snapshot.report.report.finetune.stages if snapshot.report else ()
    stages = tuple(stage for stage in reported or snapshot.status.stages if stage.name is not Stage.PREFLIGHT)
    pod = snapshot.newest_pod
    ended = pod.termination.finished if pod and pod.termination else None
    if not decision.phase.is_terminal or ended is None:
        return stages
    return tuple(_close(stage, ended) for stage in stages)


def _close(stage: StageTimes, ended: datetime) -> StageTimes:
    if stage.end_time is not None:
        return stage
    return stage.model_copy(update={"end_time": max(ended, stage.start_time)})


def _completion_time(snapshot: Snapshot) -> datetime:
    pod = snapshot.newest_pod or snapshot.of_preflight().newest_pod
    ended = pod.termination.finished if pod and pod.termination else None
    return ended or snapshot.now


def _reported(snapshot: Snapshot, outcome: Outcome | None) -> dict[str, Any]:
    """What the trainer says beside its progress."""
    run = snapshot.report.report.finetune if snapshot.report else None
    fields: dict[str, Any] = {}
    if run is not None and run.resolved is not None:
        fields["resolved"] = run.resolved
    for source in (run, outcome):
        for name in ("checkpoint_step", "resumed_from_step", "memory"):
            if source is not None and getattr(source, name) is not None:
                fields[name] = getattr(source, name)
    return fields


def _result(decision: Decision) -> dict[str, Any]:
    outcome = decision.outcome
    if decision.phase is not Phase.SUCCEEDED or outcome is None:
        return {}
    return {name: getattr(outcome, name) for name in ("artifacts", "manifest_uri", "hub_url", "reused")}


def current_stage(status: FineTuneJobStatus) -> Stage | None:
    """The newest stage that a status tells."""
    return status.stages[-1].name if status.stages else None
