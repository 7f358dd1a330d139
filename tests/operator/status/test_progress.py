"""Progress as people read it."""

import pytest

from finetune_api.progress import Resolved
from finetune_api.status import ProgressStatus
from finetune_operator.status.progress import add_speed_of_each, format_duration
from finetune_operator.status.status import build_status
from finetune_test_operator.snapshot_builder import a_report, a_running_pod, a_snapshot, decision_about

DURATIONS = [(None, None), (0, "0s"), (59, "59s"), (60, "1m00s"), (3599, "59m59s"), (11100, "3h05m"), (187200, "2d04h")]


@pytest.mark.parametrize(("seconds", "text"), DURATIONS)
def test_durations_for_people(seconds: int | None, text: str | None) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("world", "speed", "each"), [(4, 1000.0, 250.0), (None, 1000.0, None), (4, None, None)])
def test_the_speed_of_each_gpu_is_that_of_all_divided(
    world: int | None, speed: float | None, each: float | None
) -> None:
    progress = ProgressStatus(tokens_per_second=speed)
    assert add_speed_of_each(progress, Resolved(world_size=world)).tokens_per_second_per_gpu == each


def test_reports_of_several_gpus_show_it_in_the_status() -> None:
    report = a_report(tokensPerSecond=800.0, resolved={"worldSize": 8})
    snapshot = a_snapshot(pods=(a_running_pod(),), report=report)
    status = build_status(snapshot, decision_about(snapshot))
    assert status.progress is not None
    assert status.progress.tokens_per_second_per_gpu == 100.0
