"""The budget of GPU time: refused before a GPU is taken, ended in time, and counted over every pod."""

from dataclasses import replace
from datetime import timedelta

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.preflight import PreflightSummary
from finetune_api.status import Attempt, FineTuneJobStatus
from finetune_api.vocabulary import Phase
from finetune_operator.decide.decide import PREFLIGHT, TRAINING
from finetune_operator.decide.gpu_time import BACKSTOP_SECONDS
from finetune_operator.observe.children import ChildJob, TrainerPod, TrueCondition
from finetune_operator.observe.snapshot import Snapshot
from finetune_test_operator.outcomes import SUCCEEDED
from finetune_test_operator.snapshot_builder import (
    NOW,
    a_pod,
    a_preflight_snapshot,
    a_snapshot,
    a_spec,
    a_trainer_job,
    an_ended_pod,
    at,
    deciding_rule,
    decision_about,
)

BUDGET = {"resources": {"gpus": 1}, "runPolicy": {"maxGpuSeconds": 1000}}
BOUND = [{"type": "PodScheduled", "status": "True", "lastTransitionTime": at(0)}]
RUNS = a_pod("2", state={"running": {"startedAt": at(20)}}, phase="Running", conditions=BOUND)
KNOWN = FineTuneJobStatus(attempts=(Attempt(pod="p-1", uid="1", exit_code=20, held_seconds=400),), checkpoint_step=50)


SPEC = a_spec(**BUDGET)
GRACE = SPEC.run_policy.termination_grace_period_seconds
SPENT = "the job has held GPUs for 1,000 GPU-seconds, and spec.runPolicy.maxGpuSeconds allows 1,000"
INTERRUPTED = Outcome(
    result=Result.INTERRUPTED,
    reason=FailureReason.INTERRUPTED,
    exit_code=ExitCode.INTERRUPTED,
    checkpoint_step=60,
    finished=NOW,
)


def after(seconds: float, *, gpus: int = 1, job: ChildJob | None = None, pod: TrainerPod | None = RUNS) -> Snapshot:
    """A job whose second pod has held its node for so many seconds, and its first one for 400."""
    spec = a_spec(resources={"gpus": gpus}, runPolicy=BUDGET["runPolicy"])
    pods = () if pod is None else (pod,)
    found = a_snapshot(spec=spec, job=job or a_trainer_job(spec), pods=pods, status=KNOWN)
    return replace(found, now=NOW + timedelta(seconds=seconds))


def test_a_job_goes_on_until_all_of_its_pods_have_used_the_budget_up() -> None:
    decision = decision_about(after(500))
    assert decision.phase is Phase.RUNNING
    assert decision.requeue_seconds == 100, "the next look is when the budget is spent"
    assert decision_about(after(599)).phase is Phase.RUNNING


def test_a_job_that_has_used_its_budget_up_is_told_to_end_and_keeps_its_phase() -> None:
    snapshot = after(600)
    assert deciding_rule(TRAINING, snapshot, snapshot.training) == "gpu_budget_is_spent"
    decision = decision_about(snapshot)
    assert (decision.phase, decision.reason) == (Phase.RUNNING, "GpuBudgetSpent")
    assert decision.message == f"{SPENT}; the newest checkpoint is that of step 50; the trainer is being stopped"
    assert decision.actions.patch_trainer_job == {"spec": {"activeDeadlineSeconds": 600}}


def test_the_end_of_a_told_trainer_is_waited_for_but_not_for_ever() -> None:
    told = a_trainer_job(SPEC, deadline=600)
    waits = decision_about(after(630, job=told))
    assert (waits.phase, waits.actions.patch_trainer_job, waits.requeue_seconds) == (
        Phase.RUNNING,
        None,
        GRACE + 60 - 30,
    )
    overdue = decision_about(after(600 + GRACE + 60, job=told))
    assert (overdue.phase, overdue.reason) == (Phase.FAILED, "GpuBudgetExhausted")


def test_a_job_that_the_budget_has_ended_fails_with_the_time_of_its_end() -> None:
    ended = TrueCondition("DeadlineExceeded", "", NOW + timedelta(seconds=640))
    pod = an_ended_pod(30, INTERRUPTED, "2", conditions=BOUND, terminated={"startedAt": at(20), "finishedAt": at(640)})
    job = a_trainer_job(SPEC, deadline=600, failed=ended)
    decision = decision_about(after(650, job=job, pod=pod))
    assert (decision.phase, decision.reason) == (Phase.FAILED, "GpuBudgetExhausted")
    assert decision.message.startswith("the job has held GPUs for 1,040 GPU-seconds")
    assert decision.message.endswith("the newest checkpoint is that of step 60")

    # The control: a deadline of the spec's own ends the Job in the same way.
    own = a_spec(resources={"gpus": 1}, runPolicy=BUDGET["runPolicy"] | {"activeDeadlineSeconds": 600})
    assert decision_about(replace(after(650, job=job, pod=pod), spec=own)).reason == "DeadlineExceeded"


def test_a_limit_that_is_raised_lets_the_trainer_go_on() -> None:
    raised = a_spec(resources={"gpus": 1}, runPolicy={"maxGpuSeconds": 1500})
    decision = decision_about(replace(after(605), spec=raised))
    assert (decision.phase, decision.requeue_seconds) == (Phase.RUNNING, 495)
    assert decision.actions.patch_trainer_job == {"spec": {"activeDeadlineSeconds": 1100 + BACKSTOP_SECONDS}}

    late = a_trainer_job(SPEC, deadline=600, failed=TrueCondition("DeadlineExceeded", "", NOW))
    failed = decision_about(replace(after(650, job=late), spec=raised))
    assert "was raised to 1,500 when the trainer was already being stopped" in failed.message


def test_the_job_itself_ends_a_trainer_while_no_operator_runs() -> None:
    first = decision_about(after(30)).actions.patch_trainer_job
    assert first == {"spec": {"activeDeadlineSeconds": 600 + BACKSTOP_SECONDS}}
    guarded = a_trainer_job(SPEC, deadline=600 + BACKSTOP_SECONDS)
    assert decision_about(after(500, job=guarded)).actions.patch_trainer_job is None, "each look finds the same"


def test_a_job_that_waits_for_a_node_loses_nothing_of_its_time() -> None:
    guarded, waits = a_trainer_job(SPEC, deadline=660), a_pod("3", phase="Pending")
    decision = decision_about(after(500, job=guarded, pod=waits))
    assert decision.actions.patch_trainer_job == {"spec": {"activeDeadlineSeconds": None}}
    ending = decision_about(after(661, job=guarded, pod=waits))
    assert ending.actions.patch_trainer_job is None, "it would take away why the Job ends"
    queued = a_trainer_job(SPEC, deadline=660, suspended=True, queue="team", started=None)
    assert decision_about(after(5000, job=queued, pod=None)).phase is Phase.QUEUED


def test_an_earlier_deadline_of_the_spec_holds() -> None:
    spec = a_spec(resources={"gpus": 1}, runPolicy=BUDGET["runPolicy"] | {"activeDeadlineSeconds": 100})
    job = a_trainer_job(spec, deadline=100)
    assert decision_about(replace(after(30, job=job), spec=spec)).actions.patch_trainer_job is None


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
