"""The budget of GPU time: refused before a GPU is taken, ended in time, and counted over every pod."""

from dataclasses import replace
from datetime import timedelta

import pytest

from finetune_api.outcome import Outcome
from finetune_api.preflight import PreflightSummary
from finetune_api.status import Attempt, FineTuneJobStatus
from finetune_api.vocabulary import Phase
from finetune_operator.decide.decide import PREFLIGHT, TRAINING
from finetune_operator.observe.snapshot import Snapshot
from finetune_test_operator.outcomes import SUCCEEDED
from finetune_test_operator.snapshot_builder import (
    NOW,
    a_pod,
    a_preflight_snapshot,
    a_snapshot,
    a_spec,
    an_ended_pod,
    at,
    deciding_rule,
    decision_about,
)

BUDGET = {"resources": {"gpus": 1}, "runPolicy": {"maxGpuSeconds": 1000}}
BOUND = [{"type": "PodScheduled", "status": "True", "lastTransitionTime": at(0)}]
RUNS = a_pod("2", state={"running": {"startedAt": at(20)}}, phase="Running", conditions=BOUND)
KNOWN = FineTuneJobStatus(attempts=(Attempt(pod="p-1", uid="1", exit_code=20, held_seconds=400),), checkpoint_step=50)


def after(seconds: float, status: FineTuneJobStatus = KNOWN, gpus: int = 1) -> Snapshot:
    """A job whose second pod has held its node for so many seconds."""
    spec = a_spec(resources={"gpus": gpus}, runPolicy=BUDGET["runPolicy"])
    return replace(a_snapshot(spec=spec, pods=(RUNS,), status=status), now=NOW + timedelta(seconds=seconds))


def test_a_job_goes_on_until_all_of_its_pods_have_used_the_budget_up() -> None:
    decision = decision_about(after(500))
    assert decision.phase is Phase.RUNNING
    assert decision.requeue_seconds == 100, "the next look is when the budget is spent"
    assert decision_about(after(599)).phase is Phase.RUNNING


def test_a_job_that_has_used_its_budget_up_fails_and_says_what_is_kept() -> None:
    snapshot = after(600)
    assert deciding_rule(TRAINING, snapshot, snapshot.training) == "gpu_budget_is_spent"
    decision = decision_about(snapshot)
    assert decision.phase is Phase.FAILED
    assert decision.reason == "GpuBudgetExhausted"
    assert decision.message == (
        "the job has held GPUs for 1,000 GPU-seconds, and spec.runPolicy.maxGpuSeconds allows 1,000; "
        "the newest checkpoint is that of step 50"
    )
    assert decision.requeue_seconds == 0, "the next look ends the Job"


def test_a_job_without_a_gpu_has_no_budget() -> None:
    assert decision_about(after(6000, gpus=0)).phase is Phase.RUNNING


def test_a_pod_that_waits_for_a_node_uses_nothing_up() -> None:
    waits = a_pod("2", phase="Pending")
    assert (
        decision_about(replace(after(6000), training=replace(after(6000).training, pods=(waits,)))).phase
        is Phase.QUEUED
    )


def checked(gpu_hours: float | None, *, reused: bool = False) -> Outcome:
    return SUCCEEDED.model_copy(
        update={"preflight": PreflightSummary(errors=0, gpu_hours=gpu_hours), "artifacts": (), "reused": reused}
    )


@pytest.mark.parametrize(
    ("outcome", "phase"),
    [
        (checked(0.25), Phase.QUEUED),
        (checked(0.5), Phase.FAILED),
        (checked(None), Phase.QUEUED),
        (checked(0.5, reused=True), Phase.SUCCEEDED),
    ],
    ids=["fits", "does not fit", "no estimate", "nothing is to be trained"],
)
def test_an_estimate_above_the_budget_is_refused_before_a_gpu_is_taken(outcome: Outcome, phase: Phase) -> None:
    snapshot = a_preflight_snapshot(an_ended_pod(0, outcome), spec=a_spec(**BUDGET))
    decision = decision_about(snapshot)
    assert decision.phase is phase
    if phase is Phase.FAILED:
        assert deciding_rule(PREFLIGHT, snapshot, snapshot.preflight) == "gpu_budget_is_too_small"
        assert decision.message.endswith("spec.runPolicy.maxGpuSeconds allows 1,000: write 2250")
        assert not decision.actions.create_trainer_job
