"""The state of a run as reports carry it."""

import math

import pytest

from finetune_api.progress import ProgressReport
from finetune_api.vocabulary import Stage
from finetune_trainer.progress import Progress, Speed


def test_stages_follow_each_other_without_gaps() -> None:
    progress = Progress()
    for stage in Stage:
        progress.stage(stage)
    progress.finish()
    stages = progress.report().finetune.stages
    assert [times.name for times in stages] == list(Stage)
    assert [times.end_time for times in stages[:-1]] == [times.start_time for times in stages[1:]]
    assert stages[-1].end_time is not None


def test_sequence_numbers_rise() -> None:
    progress = Progress()
    assert [progress.report().finetune.sequence for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_never_reaches_a_report(loss: float) -> None:
    progress = Progress()
    progress.update(loss=0.5)
    progress.update(loss=loss, step=2)
    report = progress.report()
    assert (report.finetune.loss, report.finetune.step) == (0.5, 2)
    assert ProgressReport.model_validate_json(report.model_dump_json(by_alias=True)) == report


def test_percent_never_falls_and_stays_below_a_hundred_before_the_commit() -> None:
    progress = Progress()
    seen = []
    for stage in Stage:
        progress.stage(stage)
        seen.append(progress.percent())
        for count in range(11):
            if stage is Stage.TRAINING:
                progress.update(step=count, total_steps=10)
            if stage is Stage.UPLOADING:
                progress.update(uploaded_bytes=count, upload_total_bytes=10)
            seen.append(progress.percent())
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == 99


def test_listeners_hear_of_every_change_and_of_stages() -> None:
    progress = Progress()
    heard: list[bool] = []
    progress.listen(heard.append)
    progress.stage(Stage.TRAINING)
    progress.update(step=1)
    progress.add_uploaded(5)
    assert heard == [True, False, False]


def test_speed_counts_from_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 102.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    speed = Speed()
    assert speed.measure(1, 11, 1000) == (None, None)
    assert speed.measure(3, 11, 1400) == (200.0, 8)
