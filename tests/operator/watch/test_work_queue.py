"""The queue of keys, on a clock that the test turns."""

import asyncio

import pytest

from finetune_operator.watch.work_queue import (
    FIRST_BACKOFF_SECONDS,
    MAX_BACKOFF_SECONDS,
    URGENT_IN_A_ROW,
    Lane,
    WorkQueue,
)


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WorkQueue[str]:
    return WorkQueue(clock)


async def _next(queue: WorkQueue[str]) -> str | None:
    try:
        return await asyncio.wait_for(queue.get(), 0.05)
    except TimeoutError:
        return None


async def test_any_value_is_a_key() -> None:
    """None among them: the heartbeat was None once, was taken for "nothing is due", and every operator died of it."""
    queue: WorkQueue[object] = WorkQueue()
    for key in (None, "", 0, ()):
        queue.add(key)
    assert [await asyncio.wait_for(queue.get(), 1) for _ in range(4)] == [None, "", 0, ()]


async def test_a_key_added_twice_is_worked_on_once(queue: WorkQueue[str]) -> None:
    queue.add("a")
    queue.add("a")
    assert await _next(queue) == "a"
    queue.done("a")
    assert await _next(queue) is None


async def test_a_key_is_never_worked_on_twice_at_once(queue: WorkQueue[str]) -> None:
    queue.add("a")
    assert await _next(queue) == "a"
    queue.add("a")
    queue.add("b")
    assert await _next(queue) == "b"
    assert await _next(queue) is None
    queue.done("a")
    assert await _next(queue) == "a"


async def test_a_delayed_key_waits_and_an_earlier_wish_wins(queue: WorkQueue[str], clock: Clock) -> None:
    queue.add("a", 10)
    assert await _next(queue) is None
    clock.seconds += 11
    assert await _next(queue) == "a"
    queue.done("a")

    queue.add("a", 10)
    queue.add("a", 1)
    queue.add("a", 5)
    clock.seconds += 2
    assert await _next(queue) == "a"
    queue.done("a")

    clock.seconds += 20
    assert await _next(queue) is None


async def test_a_waiting_worker_wakes_up_for_a_new_key(queue: WorkQueue[str]) -> None:
    worker = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("a")
    assert await asyncio.wait_for(worker, 1) == "a"


async def test_failures_in_a_row_wait_longer_up_to_a_limit(queue: WorkQueue[str]) -> None:
    delays = [queue.add_after_failure("a") for _ in range(30)]
    assert FIRST_BACKOFF_SECONDS / 2 <= delays[0] <= FIRST_BACKOFF_SECONDS
    assert delays[5] > delays[0] * 8
    assert all(MAX_BACKOFF_SECONDS / 2 <= delay <= MAX_BACKOFF_SECONDS for delay in delays[10:])
    queue.succeeded("a")
    assert queue.add_after_failure("a") <= FIRST_BACKOFF_SECONDS


async def test_a_server_that_named_a_time_is_not_asked_sooner(queue: WorkQueue[str]) -> None:
    delays = {queue.add_after_failure(key, 120) for key in "abcdef"}
    assert all(120 < delay <= 120 + FIRST_BACKOFF_SECONDS for delay in delays)
    assert len(delays) > 1, "not all of them at the same moment"


async def test_many_keys_all_come_out(queue: WorkQueue[str]) -> None:
    for number in range(1000):
        queue.add(str(number))
    found = set()
    for _ in range(1000):
        key = await queue.get()
        found.add(key)
        queue.done(key)
    assert len(found) == 1000
    assert len(queue) == 0


async def test_what_is_urgent_comes_before_a_whole_background(queue: WorkQueue[str]) -> None:
    for number in range(1000):
        queue.add(f"old {number}", lane=Lane.BACKGROUND)
    queue.add("event")
    assert await _next(queue) == "event"
    assert await _next(queue) == "old 0"


async def test_the_background_has_its_turns_under_a_flood_of_events(queue: WorkQueue[str]) -> None:
    for number in range(5):
        queue.add(f"old {number}", lane=Lane.BACKGROUND)
    taken = []
    for number in range(5 * (URGENT_IN_A_ROW + 1)):
        queue.add(f"event {number}")
        key = await queue.get()
        taken.append(key)
        queue.done(key)
    assert [key for key in taken if key.startswith("old")] == [f"old {number}" for number in range(5)]
    assert taken.index("old 0") == URGENT_IN_A_ROW


async def test_one_look_answers_both_lanes(queue: WorkQueue[str], clock: Clock) -> None:
    queue.add("a", 30, Lane.BACKGROUND)
    queue.add("a")
    assert await _next(queue) == "a"
    queue.done("a")
    clock.seconds += 60
    assert await _next(queue) is None
    assert len(queue) == 0


async def test_an_event_overtakes_the_background_look_of_its_own_key(queue: WorkQueue[str]) -> None:
    for key in ("a", "b", "c"):
        queue.add(key, lane=Lane.BACKGROUND)
    queue.add("c")
    assert [await _next(queue) for _ in range(4)] == ["c", "a", "b", None]


async def test_a_key_is_never_worked_on_twice_at_once_from_two_lanes(queue: WorkQueue[str]) -> None:
    queue.add("a")
    assert await _next(queue) == "a"
    queue.add("a", lane=Lane.BACKGROUND)
    assert await _next(queue) is None
    queue.done("a")
    assert await _next(queue) == "a"


async def test_a_worker_that_is_cancelled_ends_although_a_key_arrives_at_that_moment(queue: WorkQueue[str]) -> None:
    """The clean stop of an operator hung: the end of one worker's look woke the others, who forgot to end."""

    async def work() -> None:
        while True:
            await queue.get()

    for turns in range(6):
        worker = asyncio.create_task(work())
        await asyncio.sleep(0)
        queue.add(f"key {turns}", 3600)
        for _ in range(turns):
            await asyncio.sleep(0)
        worker.cancel()
        await asyncio.wait([worker], timeout=1)
        assert worker.cancelled(), turns
