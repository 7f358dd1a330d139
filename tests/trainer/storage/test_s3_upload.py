"""Transfers in parts stop soon when they have to."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType

import pytest

from finetune_trainer.errors import InterruptedRunError
from finetune_trainer.storage.s3_upload import collect


@pytest.fixture
def alarm() -> Iterator[None]:
    """A signal after 0.1 s whose handler raises, as that of SIGTERM does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise InterruptedRunError("stopped by SIGALRM")

    former = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


def test_results_come_in_order() -> None:
    with ThreadPoolExecutor(4) as pool:
        assert collect(pool, [partial(abs, -number) for number in range(20)]) == list(range(20))


def test_the_first_failure_drops_what_waits() -> None:
    ran: list[int] = []

    def task(number: int) -> None:
        ran.append(number)
        time.sleep(0.01)
        raise OSError(f"part {number}")

    with ThreadPoolExecutor(2) as pool, pytest.raises(OSError, match="part 0"):
        collect(pool, [partial(task, number) for number in range(100)])
    assert len(ran) < 20


def test_a_signal_drops_what_waits(alarm: None) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool, pytest.raises(InterruptedRunError):
        collect(pool, [partial(time.sleep, 0.05)] * 200)  # 5 s of work
    assert time.monotonic() - began < 1
