"""What a running Job takes over from the spec: suspension and deadline."""

from datetime import timedelta

import pytest

from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION
from finetune_test_operator.snapshot_builder import (
    NOW,
    a_snapshot,
    a_spec,
    a_trainer_job,
    decision_about,
)

SUSPENDED = {"runPolicy": {"suspend": True}}


def test_suspending_records_the_time_of_running_in_the_same_patch() -> None:
    snapshot = a_snapshot(a_spec(**SUSPENDED), job=a_trainer_job(active_seconds=100), now=NOW + timedelta(seconds=50))
    assert decision_about(snapshot).actions.patch_trainer_job == {
        "spec": {"suspend": True},
        "metadata": {"annotations": {ACTIVE_SECONDS_ANNOTATION: "150"}},
    }


def test_resuming_leaves_what_is_left_of_the_deadline() -> None:
    spec = a_spec(runPolicy={"activeDeadlineSeconds": 1000})
    child = a_trainer_job(suspended=True, started=None, active_seconds=400, deadline=1000)
    assert decision_about(a_snapshot(spec, job=child)).actions.patch_trainer_job == {
        "spec": {"suspend": False, "activeDeadlineSeconds": 600}
    }


DEADLINES: dict[str, tuple[int | None, int | None, object]] = {
    "unchanged": (1000, 1000, None),
    "longer": (1000, 2000, {"spec": {"activeDeadlineSeconds": 2000}}),
    "removed": (1000, None, {"spec": {"activeDeadlineSeconds": None}}),
    "added": (None, 60, {"spec": {"activeDeadlineSeconds": 60}}),
}


@pytest.mark.parametrize(("live", "wanted", "patch"), DEADLINES.values(), ids=DEADLINES)
def test_the_deadline_follows_the_spec(live: int | None, wanted: int | None, patch: object) -> None:
    spec = a_spec(runPolicy={"activeDeadlineSeconds": wanted} if wanted else {})
    snapshot = a_snapshot(spec, job=a_trainer_job(deadline=live))
    assert decision_about(snapshot).actions.patch_trainer_job == patch
