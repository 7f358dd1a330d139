"""Which of a job's reports its status says, and when: seldom enough for etcd, and never later than that."""

import pytest

from finetune_operator.observe.report_store import SHOW_SECONDS, ReportStore
from finetune_test_operator.snapshot_builder import a_report

JOB = "job-uid"


class Clock:
    """A clock that stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> ReportStore:
    """A store that has shown the first report of a job."""
    store = ReportStore(clock)
    store.put(JOB, a_report(1))
    assert store.seconds_until_shown(JOB) == 0
    assert store.show(JOB) == a_report(1)
    return store


def test_a_look_at_a_job_sees_the_same_report_until_its_time_is_over(store: ReportStore, clock: Clock) -> None:
    assert store.seconds_until_shown(JOB) is None

    for second in range(1, int(SHOW_SECONDS)):
        clock.now = 100 + second
        store.put(JOB, a_report(1 + second))
        assert store.seconds_until_shown(JOB) == SHOW_SECONDS - second, "no report puts off the next write"
        assert store.show(JOB) == a_report(1)
    assert store.newest(JOB) == a_report(10)

    clock.now = 100 + SHOW_SECONDS
    assert store.seconds_until_shown(JOB) == 0
    assert store.show(JOB) == a_report(10)
    assert store.seconds_until_shown(JOB) is None


def test_looks_without_a_new_report_put_nothing_off(store: ReportStore, clock: Clock) -> None:
    clock.now += SHOW_SECONDS
    store.show(JOB)
    store.put(JOB, a_report(2))
    assert store.seconds_until_shown(JOB) == 0


def test_another_stage_and_another_pod_are_shown_at_once(store: ReportStore) -> None:
    store.put(JOB, a_report(2, stage="Uploading"))
    assert store.show(JOB) == a_report(2, stage="Uploading")
    store.put(JOB, a_report(1, pod="pod-2"))
    assert store.show(JOB) == a_report(1, pod="pod-2")


def test_a_job_that_is_over_or_gone_shows_nothing(store: ReportStore) -> None:
    store.put(JOB, a_report(2))
    store.lock(JOB)
    store.drop(JOB)
    assert store.show(JOB) is None
    assert store.seconds_until_shown(JOB) is None
    assert store.is_locked(JOB)

    store.forget(JOB)
    assert store.show(JOB) is None
    assert not store.is_locked(JOB)
