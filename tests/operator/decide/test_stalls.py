"""A run that stalls or diverges goes on once from its checkpoint; a trainer that falls silent is evicted, but not for
silence that is the operator's own."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.pod_ends.stalls import StallLimit
from finetune_api.status import Attempt, FineTuneJobStatus, ProgressStatus
from finetune_api.vocabulary import Phase, Stage
from finetune_operator.decide.decide import decide
from finetune_operator.decide.decision import Actions, Eviction
from finetune_operator.desired.names import child_name
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.report_store import Channel, Heard
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.status.events import find_transitions
from finetune_operator.status.status import build_status
from finetune_test_operator.snapshot_builder import (
    INSTALLATION,
    METADATA,
    NOW,
    POD,
    a_config_map,
    a_report,
    a_running_pod,
    a_snapshot,
    a_spec,
    an_ended_pod,
    decision_about,
)


def an_outcome(reason: FailureReason, code: ExitCode, message: str = "as the trainer says") -> Outcome:
    return Outcome(
        result=Result.FAILED,
        reason=reason,
        message=message,
        exit_code=code,
        stage=Stage.TRAINING,
        step=7,
        checkpoint_step=4,
        finished=NOW,
    )


STALLED = an_outcome(FailureReason.STALLED, ExitCode.STALLED)
NOT_FINITE = an_outcome(FailureReason.NON_FINITE_LOSS, ExitCode.DIVERGED)
DIVERGED = an_outcome(FailureReason.LOSS_DIVERGED, ExitCode.DIVERGED)
FRUGAL = a_spec(runPolicy={"maxRetries": 0})


def stalled_pod(uid: str = POD, created: float = 0, outcome: Outcome | None = STALLED) -> TrainerPod:
    return an_ended_pod(31, outcome, uid, created)


def diverged_pod(uid: str = POD, created: float = 0, outcome: Outcome | None = NOT_FINITE) -> TrainerPod:
    return an_ended_pod(32, outcome, uid, created)


FIRST = {
    "a stall": ((stalled_pod(),), "Stalled"),
    "a stall without a word": ((stalled_pod(outcome=None),), "TrainerCrashed"),
    "no number": ((diverged_pod(),), "NonFiniteLoss"),
    "an explosion": ((diverged_pod(outcome=DIVERGED),), "LossDiverged"),
    "no number after a stall": ((stalled_pod("old"), diverged_pod(created=60)), "NonFiniteLoss"),
}


@pytest.mark.parametrize(("pods", "reason"), FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("spec", [a_spec(), FRUGAL], ids=["with retries", "without retries"])
def test_the_first_time_another_pod_follows(pods: tuple[TrainerPod, ...], reason: str, spec: Any) -> None:
    decision = decision_about(a_snapshot(spec, pods=pods))
    assert (decision.phase, decision.reason) == (Phase.QUEUED, "Retrying")
    assert decision.message.startswith(f"{reason}: ")


KNOWN = Attempt(pod="bot-old", uid="old", exit_code=31, reason="Stalled", start_time=NOW, end_time=NOW)
SILENT_BEFORE = Attempt(pod="bot-old", uid="old", reason="Stalled", start_time=NOW)
SECOND = {
    "stalls": (a_snapshot(pods=(stalled_pod("old"), stalled_pod(created=60))), "Stalled"),
    "a stall whose pod is gone": (
        a_snapshot(pods=(stalled_pod(created=60),), status=FineTuneJobStatus(attempts=(KNOWN,))),
        "Stalled",
    ),
    "a stall after a silence": (
        a_snapshot(pods=(stalled_pod(created=60),), status=FineTuneJobStatus(attempts=(SILENT_BEFORE,))),
        "Stalled",
    ),
    "no number after an explosion": (
        a_snapshot(pods=(diverged_pod("old", outcome=DIVERGED), diverged_pod(created=60))),
        "NonFiniteLoss",
    ),
    "with a crash in between": (
        a_snapshot(pods=(stalled_pod("old"), an_ended_pod(139, uid="c", created=30), stalled_pod(created=60))),
        "Stalled",
    ),
}


@pytest.mark.parametrize(("snapshot", "reason"), SECOND.values(), ids=SECOND)
def test_the_second_time_the_job_fails(snapshot: Snapshot, reason: str) -> None:
    decision = decision_about(snapshot)
    assert (decision.phase, decision.reason, decision.requeue_seconds) == (Phase.FAILED, reason, 0)
    assert decision.failure is not None
    assert "as the trainer says; it happened before, in pod bot-old" in decision.failure.message
    assert (decision.failure.stage, decision.failure.step) == (Stage.TRAINING, 7)

    # The next look ends the Job, before its controller makes a third pod.
    failed = replace(snapshot, status=build_status(snapshot, decision))
    assert decision_about(failed).actions.patch_trainer_job == {"spec": {"activeDeadlineSeconds": 1}}


def test_a_pod_that_runs_is_not_ended_for_those_before_it() -> None:
    """While the operator was down, a third pod may have begun."""
    pods = (stalled_pod("a"), stalled_pod("b", 60), a_running_pod(created=120))
    assert decision_about(a_snapshot(pods=pods)).phase is Phase.RUNNING


LIMIT = StallLimit.of(600)
LIMITED = a_spec(runPolicy={"stallTimeoutSeconds": 600})
SILENCE, END = int(LIMIT.silence.total_seconds()), int((LIMIT.silence + LIMIT.patience).total_seconds())
REPORTED = FineTuneJobStatus(
    phase=Phase.RUNNING,
    progress=ProgressStatus(sequence=9, last_report_time=NOW),
    attempts=(Attempt(pod=f"bot-{POD}", uid=POD, start_time=NOW),),
)
LISTENS = Channel(NOW - timedelta(hours=1), Heard(POD, NOW))


def after(seconds: float, **fields: Any) -> Snapshot:
    """A trainer that reported at NOW, seen so many seconds later."""
    given: dict[str, Any] = {"pods": (a_running_pod(),), "report": a_report(), "status": REPORTED, "channel": LISTENS}
    return a_snapshot(fields.pop("spec", LIMITED), **given | fields, now=NOW + timedelta(seconds=seconds))


def test_a_short_silence_is_none_and_the_next_look_is_when_it_is_one() -> None:
    decision = decision_about(after(100))
    assert (decision.reason, decision.requeue_seconds) == ("Training", SILENCE - 100)


def test_first_the_status_says_it() -> None:
    decision = decision_about(after(SILENCE))
    assert (decision.phase, decision.reason, decision.is_stalled) == (Phase.RUNNING, "NotReporting", False)
    assert decision.actions == Actions()
    assert decision.requeue_seconds == END - SILENCE
    assert "has not reported since 12:00:00 UTC" in decision.message
    assert "its pod is evicted at 12:17:00 UTC" in decision.message
    assert decision_about(after(SILENCE + 60)).message == decision.message, (
        "a look that sees nothing new writes nothing"
    )
    status = build_status(after(SILENCE), decision)
    running = {each.type.value: each for each in status.conditions}["Running"]
    assert (running.status, running.reason) == ("True", "NotReporting")
    assert [each.reason for each in find_transitions(REPORTED, status)] == ["NotReporting"]


def test_then_the_pod_counts_as_stalled_and_is_evicted_by_its_uid() -> None:
    snapshot = after(END)
    decision = decision_about(snapshot)
    assert (decision.reason, decision.requeue_seconds, decision.actions) == ("Stalled", 0, Actions())
    status = build_status(snapshot, decision)
    assert status.attempts[0].reason == "Stalled"
    assert [each.reason for each in find_transitions(REPORTED, status)] == ["Stalled"]

    known = replace(snapshot, status=status)
    assert decision_about(known).actions.evict_pod == Eviction(f"bot-{POD}", POD)
    deleting = replace(a_running_pod(), deleting=True)
    stopping = replace(known, training=replace(known.training, pods=(deleting,)))
    decision = decision_about(stopping)
    assert (decision.reason, decision.actions) == ("Stalled", Actions())
    assert "kubectl delete node" in decision.message


def test_an_evicted_pod_stays_stalled_and_another_one_follows() -> None:
    status = build_status(after(END), decision_about(after(END)))
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
    ended = an_ended_pod(137, conditions=[condition])
    gone = after(END + 60, status=status, pods=(ended,), report=None)
    later = build_status(gone, decision_about(gone))
    assert (later.attempts[0].reason, later.attempts[0].exit_code) == ("Stalled", 137)
    assert later.phase is Phase.QUEUED


def test_the_second_silence_ends_the_job() -> None:
    status = REPORTED.model_copy(update={"attempts": (SILENT_BEFORE, *REPORTED.attempts)})
    decision = decision_about(after(END, status=status))
    assert (decision.phase, decision.reason) == (Phase.FAILED, "Stalled")
    assert "a pod stalled before, bot-old" in decision.message


NOT_SILENT: dict[str, dict[str, Any]] = {
    "the operator has only begun to lead": {"channel": Channel(NOW + timedelta(seconds=END - 10))},
    "the operator does not lead, or cannot reach its own server": {"channel": Channel()},
    "the trainer has never reported": {
        "report": None,
        "status": FineTuneJobStatus(),
        "channel": replace(LISTENS, heard=None),
    },
    "only an older pod has reported": {
        "report": None,
        "channel": replace(LISTENS, heard=Heard("old", NOW)),
        "status": REPORTED.model_copy(update={"attempts": (SILENT_BEFORE,)}),
    },
    "it reports what this operator cannot read": {
        "channel": replace(LISTENS, heard=Heard(POD, NOW + timedelta(seconds=END - 10)))
    },
    "its Job is older than the operator's certificate": {
        "report": None,
        "config_map": a_config_map(LIMITED, replace(INSTALLATION, ca_certificate="FORMER PEM")),
    },
    "the job is suspended": {"spec": a_spec(runPolicy={"stallTimeoutSeconds": 600, "suspend": True})},
}


@pytest.mark.parametrize("fields", NOT_SILENT.values(), ids=NOT_SILENT)
def test_silence_that_is_not_the_trainers_own_is_none(fields: dict[str, Any]) -> None:
    decision = decision_about(after(END, **fields))
    assert decision.reason not in ("NotReporting", "Stalled")
    assert decision.given_up_pod is None


def test_trainers_of_an_older_version_are_silent_in_long_steps() -> None:
    snapshot = after(END)
    assert snapshot.config_map is not None
    text = snapshot.config_map["data"]["run_config.yaml"]
    assert "\nstall:\n" in text
    older = {
        "metadata": {**snapshot.config_map["metadata"], "name": child_name(METADATA)},
        "data": {"run_config.yaml": text.replace("\nstall:\n", "\nolder:\n")},
    }
    assert decision_about(replace(snapshot, config_map=older)).reason == "Training"


def test_a_trainer_that_reports_to_another_address_is_left_alone_and_looked_at_rarely() -> None:
    """The operator's address has changed since its Job was made."""
    decision = decide(after(END), replace(INSTALLATION, progress_url="https://another:8443"))
    assert (decision.reason, decision.given_up_pod) == ("Training", None)
    assert decision.requeue_seconds is not None
    assert decision.requeue_seconds >= 30


def test_a_restarted_operator_counts_from_its_start() -> None:
    began = Channel(NOW + timedelta(seconds=1000))
    quiet = after(1000 + SILENCE - 1, report=None, channel=began)
    assert decision_about(quiet).reason == "TrainerStarted"
    assert decision_about(after(1000 + SILENCE, report=None, channel=began)).reason == "NotReporting"


def test_trainers_that_fall_silent_together_are_left_alone() -> None:
    together = replace(LISTENS, others_heard=NOW + timedelta(seconds=30))
    decision = decision_about(after(END + 3600, channel=together))
    assert (decision.reason, decision.given_up_pod) == ("NotReporting", None)
    assert "other trainers fell silent at the same time" in decision.message

    alone = replace(LISTENS, others_heard=NOW + timedelta(seconds=END))
    assert decision_about(after(END, channel=alone)).given_up_pod == POD
