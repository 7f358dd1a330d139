"""A namespace's limit of GPUs: who waits, who is refused, and what they are told."""

from dataclasses import replace
from datetime import timedelta

import pytest

from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import ConditionType, Phase
from finetune_operator.decide.decide import decide
from finetune_operator.decide.waiting.gpu_limit import FAR_LOOK_SECONDS, NEXT_LOOK_SECONDS
from finetune_operator.observe.snapshot import GpuUse, GpuUser, Snapshot
from finetune_test_operator.snapshot_builder import (
    INSTALLATION,
    NOW,
    a_condition,
    a_snapshot,
    a_spec,
    a_trainer_job,
    decision_about,
)

SKIP = {"preflight": "Skip"}
FULL = GpuUse(4, (GpuUser("a", 2), GpuUser("b", 1)))


def _job(use: GpuUse | None, gpus: int = 2, **run_policy: object) -> Snapshot:
    """A job that wants to start."""
    spec = a_spec(resources={"gpus": gpus}, runPolicy=SKIP | run_policy)
    return a_snapshot(spec, job=None, gpu_use=use)


STARTS: dict[str, tuple[GpuUse | None, int, bool]] = {
    "without a limit": (None, 4, True),
    "nobody else": (GpuUse(4), 4, True),
    "what is left": (FULL, 1, True),
    "one too many": (FULL, 2, False),
    "what another waits for": (GpuUse(4, (GpuUser("a", 2),), (GpuUser("old", 2),)), 1, False),
    "what another leaves": (GpuUse(4, (GpuUser("a", 2),), (GpuUser("old", 1),)), 1, True),
    "a small job behind a large one": (GpuUse(4, (GpuUser("a", 3),), (GpuUser("old", 4),)), 1, False),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_job_starts_if_there_is_room_for_it_and_for_those_before_it(name: str) -> None:
    use, gpus, starts = STARTS[name]
    decision = decision_about(_job(use, gpus))
    assert (decision.actions.create_trainer_job is not None) is starts
    if not starts:
        assert (decision.phase, decision.reason, decision.is_stalled) == (Phase.QUEUED, "GpuLimitReached", False)
        assert not decision.actions.creates


def test_the_message_names_limit_users_line_and_what_to_do() -> None:
    ahead = tuple(GpuUser(f"old-{number}", 1) for number in range(7))
    assert decision_about(_job(replace(FULL, ahead=ahead))).message == (
        "jobs of namespace team may use 4 GPUs at a time (maxGpusPerNamespace), and this one asks for 2; "
        "in use: 3 GPUs by a (2), b (1); "
        "first in line, as created earlier: old-0 (1), old-1 (1), old-2 (1), old-3 (1), old-4 (1) and 2 more. "
        "It starts by itself. To make room, suspend or delete one of these jobs"
    )


def test_a_resumed_job_waits_as_well() -> None:
    spec = a_spec(resources={"gpus": 2}, runPolicy=SKIP)
    held = a_trainer_job(a_spec(resources={"gpus": 2}, runPolicy=SKIP | {"suspend": True}))
    waiting = decision_about(a_snapshot(spec, job=held, gpu_use=FULL))
    assert (waiting.phase, waiting.reason) == (Phase.QUEUED, "GpuLimitReached")
    assert waiting.actions.patch_trainer_job is None
    assert waiting.requeue_seconds == NEXT_LOOK_SECONDS

    resumed = decision_about(a_snapshot(spec, job=held, gpu_use=GpuUse(4)))
    assert resumed.actions.patch_trainer_job == {"spec": {"suspend": False}}


def test_who_is_far_behind_is_looked_at_less_often() -> None:
    near, far = (replace(FULL, ahead=(GpuUser("old", 1),) * length) for length in (9, 10))
    assert decision_about(_job(near)).requeue_seconds == NEXT_LOOK_SECONDS
    assert decision_about(_job(far)).requeue_seconds == FAR_LOOK_SECONDS


@pytest.mark.parametrize("gpus", [4, 8])
def test_a_job_that_can_never_start_is_refused_at_once(gpus: int) -> None:
    limited = replace(INSTALLATION, max_gpus_per_namespace=4)
    decision = decide(_job(GpuUse(4), gpus), limited)
    assert (decision.reason == "GpuLimitExceeded") is (gpus > 4)
    if gpus > 4:
        assert decision.phase is Phase.FAILED
        assert not decision.actions.creates
        assert decision.message.startswith("spec.resources.gpus is 8, and the administrator allows 4 at a time")


def test_a_job_that_runs_is_left_alone_when_the_limit_is_lowered() -> None:
    running = a_snapshot(a_spec(resources={"gpus": 8}, runPolicy=SKIP))
    assert decide(running, replace(INSTALLATION, max_gpus_per_namespace=4)).phase is Phase.QUEUED


def test_the_startup_deadline_counts_the_wait() -> None:
    waits = _job(FULL, startupDeadlineSeconds=600)
    status = FineTuneJobStatus(phase=Phase.QUEUED, conditions=(a_condition(ConditionType.QUEUED),))
    before, after = (replace(waits, status=status, now=NOW + timedelta(seconds=seconds)) for seconds in (590, 600))
    assert (decision_about(before).reason, decision_about(before).requeue_seconds) == ("GpuLimitReached", 10)
    assert decision_about(after).reason == "StartupDeadlineExceeded"
    assert "maxGpusPerNamespace" in decision_about(after).message
