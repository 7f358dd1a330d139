"""The state of a run as reports carry it."""

import math
import time

import pytest

from finetune_api.progress import ProgressReport
from finetune_api.vocabulary import Stage
from finetune_trainer.job.progress_tracker import STAGE_START, ProgressTracker, Speed, TransferRate


def test_stages_follow_each_other_without_gaps() -> None:
    progress = ProgressTracker()
    for stage in STAGE_START:
        progress.stage(stage)
    progress.finish()
    stages = progress.report().finetune.stages
    assert [times.name for times in stages] == list(STAGE_START)
    assert [times.end_time for times in stages[:-1]] == [times.start_time for times in stages[1:]]
    assert stages[-1].end_time is not None


def test_sequence_numbers_rise() -> None:
    progress = ProgressTracker()
    assert [progress.report().finetune.sequence for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_never_reaches_a_report(loss: float) -> None:
    progress = ProgressTracker()
    progress.update(loss=0.5)
    progress.update(loss=loss, step=2)
    report = progress.report()
    assert (report.finetune.loss, report.finetune.step) == (0.5, 2)
    assert ProgressReport.model_validate_json(report.model_dump_json(by_alias=True)) == report


def test_percent_never_falls_and_stays_below_a_hundred_before_the_commit() -> None:
    progress = ProgressTracker()
    seen = []
    for stage in STAGE_START:
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
    progress = ProgressTracker()
    heard: list[bool] = []
    progress.listen(heard.append)
    progress.stage(Stage.TRAINING)
    progress.update(step=1)
    progress.add_uploaded(5)
    assert heard == [True, False, False]


def test_speed_counts_from_the_second_step() -> None:
    now = iter([100.0, 102.0])
    speed = Speed(clock=lambda: next(now))
    assert speed.measure(1, 11, 1000) == (None, None)
    assert speed.measure(3, 11, 1400) == (200.0, 8)


def test_the_upload_rate_is_that_of_the_last_half_minute() -> None:
    now = 0.0
    rate = TransferRate(clock=lambda: now)
    assert rate.measure(0) is None
    for now in range(1, 101):  # 100 s at 1 MB/s
        slow = rate.measure(now * 10**6)
    assert slow == pytest.approx(1e6)
    for now in range(101, 141):  # 40 s at 10 MB/s
        fast = rate.measure(100 * 10**6 + (now - 100) * 10**7)
    assert fast == pytest.approx(1e7)
    assert fast / 2 > 500 * 10**6 / 140, "the mean over everything would be another number"


def test_an_upload_reports_bytes_rate_and_time_to_the_end() -> None:
    progress = ProgressTracker()
    progress.stage(Stage.UPLOADING)
    progress.update(uploaded_bytes=0, upload_total_bytes=4000, eta_seconds=999)
    for _ in range(3):
        progress.add_uploaded(1000)
        time.sleep(0.02)
    report = progress.report()
    assert report.finetune.uploaded_bytes == 3000
    assert report.finetune.upload_bytes_per_second
    assert report.finetune.upload_bytes_per_second > 1000
    assert report.trainer_status.estimated_remaining_seconds == 0, "1000 bytes at more than 1000 a second"
