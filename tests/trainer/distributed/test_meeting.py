"""The meeting of two pods in one process: what each hears of the other before and while they train."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_test_models.ranks.nodes import free_port
from finetune_trainer import signs_of_life, stopping
from finetune_trainer.distributed.nodes import meeting
from finetune_trainer.distributed.nodes.meeting import Meeting
from finetune_trainer.distributed.nodes.place import Place
from finetune_trainer.errors import TrainerError

Pair = tuple[Meeting, Meeting]


@pytest.fixture
def ended() -> list[TrainerError]:
    """Errors with which pods would have ended."""
    return []


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, ended: list[TrainerError]) -> Iterator[Pair]:
    """The first pod and the second, which have met."""
    stopping.reset()
    monkeypatch.setattr(meeting, "BEAT_SECONDS", 0.05)
    port = free_port()
    places = [Place(index, 2, "127.0.0.1", port) for index in (0, 1)]

    with ThreadPoolExecutor(1) as pool:
        opened = Meeting.opened(places[0], ended.append)
        first = pool.submit(opened.__enter__)
        with Meeting.joined(places[1], ended.append) as second:
            yield first.result(20), second
            second._closing.set()
        stopping.request_stop("the test")  # the first pod does not wait to be heard
        opened.__exit__(None, None, None)
        stopping.reset()


def test_the_first_pod_waits_for_the_others_and_shows_that_it_lives(pair: Pair) -> None:
    first, second = pair
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.arrive)
        beat = signs_of_life.last_beat()
        wait_for(lambda: signs_of_life.last_beat() > beat)
        assert not waiting.done(), "a pod that loads longer is no stall of the first one"
        second.arrive()
        waiting.result(20)


def test_every_pod_is_asked_once_for_the_stacks_of_all_its_processes(
    pair: Pair, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = pair
    asked: list[int] = []
    second.on_stacks = lambda: asked.append(1)
    first.ask_for_stacks()
    wait_for(lambda: bool(asked))
    time.sleep(0.3)
    assert asked == [1]
    written = capfd.readouterr().err
    assert "most recent call first" in written
    assert "meeting.py" in written


def test_what_one_pod_says_of_its_end_is_the_reason_of_the_others(pair: Pair, ended: list[TrainerError]) -> None:
    _, second = pair
    second.fail(TrainerError(FailureReason.CUDA_OUT_OF_MEMORY, "rank 3 of 4: the run does not fit the GPU's memory"))
    wait_for(lambda: bool(ended))
    assert ended[0].reason is FailureReason.CUDA_OUT_OF_MEMORY
    assert ended[0].message == "node 1 of 2: rank 3 of 4: the run does not fit the GPU's memory"
    assert ended[0].exit_code == ExitCode.INTERRUPTED, "the Job counts the pod that failed"


@pytest.mark.parametrize("silent", [0, 1])
def test_a_pod_without_a_sign_of_life_is_lost(
    pair: Pair, ended: list[TrainerError], monkeypatch: pytest.MonkeyPatch, silent: int
) -> None:
    pair[1 - silent]._patience = 0.5
    pair[silent]._closing.set()  # its thread goes, as that of a frozen process
    began = time.monotonic()
    wait_for(lambda: bool(ended))
    assert time.monotonic() - began >= 0.4
    assert ended[0].message == f"node {silent} is gone: it showed no sign of life for 0 s"
    assert ended[0].exit_code == ExitCode.INTERRUPTED


def test_a_first_pod_whose_store_keeps_the_connection_and_answers_nothing_is_lost(
    pair: Pair, ended: list[TrainerError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a frozen process does."""
    second, over = pair[1], Event()
    second._patience = 0.5
    monkeypatch.setattr(second, "_signs", SilentStore(over))
    wait_for(lambda: bool(ended))
    over.set()
    assert ended[0].message == "node 0 is gone: the store that it keeps does not answer"
    assert ended[0].exit_code == ExitCode.INTERRUPTED


@dataclass
class SilentStore:
    over: Event

    def add(self, _key: str, _amount: int) -> int:
        self.over.wait(30)
        return 0

    def check(self, _keys: list[str]) -> bool:
        return False


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
