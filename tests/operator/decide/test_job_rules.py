"""Rules about the FineTuneJob itself: it is over, is being deleted, cannot be read, or is not the owner of a name."""

from dataclasses import replace

import pytest

from finetune_api.job import ObjectMeta
from finetune_api.outcome import Outcome, Result
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import Phase
from finetune_operator.decide.decide import BLIND, UNREADABLE
from finetune_operator.decide.decision import RETRY_SECONDS, Actions
from finetune_operator.observe.children import TrueCondition
from finetune_operator.observe.snapshot import BlindSnapshot, UnreadableSnapshot
from finetune_test_operator.snapshot_builder import (
    METADATA,
    NOW,
    a_blind_snapshot,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    an_ended_pod,
    an_unreadable_snapshot,
    at,
    deciding_rule,
    decision_about,
)

MAGIC = "spec.model.magic: unknown"
COMPLETE = TrueCondition("CompletionsReached", "", NOW)
DELETED = METADATA.model_copy(update={"deletion_timestamp": at(0)})
SUCCEEDED = Outcome(result=Result.SUCCEEDED, finished=NOW, manifest_uri="s3://results/manifest.json")


def _status(phase: Phase) -> FineTuneJobStatus:
    return FineTuneJobStatus(phase=phase)


@pytest.mark.parametrize("phase", [Phase.SUCCEEDED, Phase.FAILED])
def test_a_terminal_job_never_gets_children_again(phase: Phase) -> None:
    decision = decision_about(a_snapshot(job=None, config_map=None, status=_status(phase)))
    assert decision.actions == Actions()
    assert decision.phase is phase


def test_the_ttl_is_set_only_after_the_terminal_status_is_written() -> None:
    spec = a_spec(runPolicy={"ttlSecondsAfterFinished": 60})
    child = a_trainer_job(complete=COMPLETE)
    pods = (an_ended_pod(0, SUCCEEDED),)
    assert decision_about(a_snapshot(spec, job=child, pods=pods)).actions == Actions()
    after = a_snapshot(spec, job=child, status=_status(Phase.SUCCEEDED))
    assert decision_about(after).actions.patch_trainer_job == {"spec": {"ttlSecondsAfterFinished": 60}}
    done = a_snapshot(spec, job=replace(child, ttl=60), status=_status(Phase.SUCCEEDED))
    assert decision_about(done).actions == Actions()


UNREADABLE_CASES: dict[str, tuple[UnreadableSnapshot, Phase, str]] = {
    "it runs": (
        an_unreadable_snapshot(MAGIC, status=_status(Phase.RUNNING), pods=(a_running_pod(),)),
        Phase.RUNNING,
        "InvalidConfiguration",
    ),
    "it is new": (an_unreadable_snapshot(MAGIC, job=None), Phase.PENDING, "InvalidConfiguration"),
    "it is being deleted": (an_unreadable_snapshot(MAGIC, metadata=DELETED), Phase.CANCELLING, "Deleted"),
    "it is over": (
        an_unreadable_snapshot(MAGIC, status=_status(Phase.FAILED), job=a_trainer_job(complete=COMPLETE, ttl=60)),
        Phase.FAILED,
        "",
    ),
}


@pytest.mark.parametrize(("snapshot", "phase", "reason"), UNREADABLE_CASES.values(), ids=UNREADABLE_CASES)
def test_a_job_that_this_version_cannot_read_is_left_alone(
    snapshot: UnreadableSnapshot, phase: Phase, reason: str
) -> None:
    decision = decision_about(snapshot)
    assert (decision.phase, decision.reason) == (phase, reason)
    assert decision.is_stalled == (reason == "InvalidConfiguration")
    assert decision.actions == Actions()
    assert ("spec.model.magic" in decision.message) == decision.is_stalled


def test_every_rule_about_an_unreadable_job_decides_a_case() -> None:
    deciding = {deciding_rule(UNREADABLE, case[0], case[0].training) for case in UNREADABLE_CASES.values()}
    assert deciding == {rule.__name__ for rule in (*UNREADABLE.rules, UNREADABLE.otherwise)}


HIDDEN_CASES: dict[str, tuple[BlindSnapshot, Phase, str]] = {
    "it runs": (a_blind_snapshot("cannot list pods", _status(Phase.RUNNING)), Phase.RUNNING, "PermissionDenied"),
    "it is new": (a_blind_snapshot("cannot list pods", FineTuneJobStatus()), Phase.PENDING, "PermissionDenied"),
    "it is being deleted": (
        replace(a_blind_snapshot("cannot list pods", FineTuneJobStatus()), metadata=DELETED),
        Phase.CANCELLING,
        "Deleted",
    ),
    "it is over": (a_blind_snapshot("cannot list pods", _status(Phase.FAILED)), Phase.FAILED, ""),
}


@pytest.mark.parametrize(("snapshot", "phase", "reason"), HIDDEN_CASES.values(), ids=HIDDEN_CASES)
def test_a_job_whose_children_are_hidden_keeps_its_phase_and_gets_none(
    snapshot: BlindSnapshot, phase: Phase, reason: str
) -> None:
    decision = decision_about(snapshot)
    assert (decision.phase, decision.reason) == (phase, reason)
    assert decision.actions == Actions()
    assert decision.is_stalled == (reason == "PermissionDenied")
    if decision.is_stalled:
        assert decision.message == "cannot list pods"
        assert decision.requeue_seconds == RETRY_SECONDS


def test_every_rule_about_hidden_children_decides_a_case() -> None:
    deciding = {deciding_rule(BLIND, case[0], case[0].training) for case in HIDDEN_CASES.values()}
    assert deciding == {rule.__name__ for rule in (*BLIND.rules, BLIND.otherwise)}


def test_the_uid_decides_whose_job_it_is() -> None:
    again = ObjectMeta(name=METADATA.name, namespace=METADATA.namespace, uid="another", generation=1)
    spec: FineTuneJobSpec = a_spec()
    assert decision_about(a_snapshot(spec, metadata=again)).reason == "NameConflict"
