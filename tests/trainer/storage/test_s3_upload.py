"""Transfers in parts stop soon when they have to."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from finetune_trainer import stopping
from finetune_trainer.errors import InterruptedRunError
from finetune_trainer.storage.s3_upload import collect


@pytest.fixture
def request_soon() -> Iterator[None]:
    """A request to stop after 0.1 s."""
    stopping.reset()
    threading.Timer(0.1, stopping.request_stop, ["SIGTERM"]).start()
    yield
    stopping.reset()


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


def test_a_request_to_stop_drops_what_waits_and_leaves_alone_what_runs(request_soon: None) -> None:
    pool, began = ThreadPoolExecutor(2), time.monotonic()
    with pytest.raises(InterruptedRunError):
        collect(pool, [partial(time.sleep, 2)] * 200)
    assert time.monotonic() - began < 1
    pool.shutdown()
