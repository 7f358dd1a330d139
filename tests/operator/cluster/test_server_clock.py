"""The API server's clock, from the Date headers of its answers."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from finetune_operator.cluster.server_clock import ServerClock

NOON = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


class Server:
    """A server whose clock the test sets, and a monotonic clock beside it."""

    def __init__(self) -> None:
        self.time = NOON
        self.monotonic = 5.0
        self.clock = ServerClock(lambda: self.monotonic)

    def answer(self, there: float = 0, back: float = 0) -> None:
        """Let a request travel for so many seconds, and its answer."""
        sent = self.monotonic
        self.wait(there)
        date = format_datetime(self.time, usegmt=True)
        self.wait(back)
        self.clock.note(date, sent)

    def wait(self, seconds: float) -> None:
        self.monotonic += seconds
        self.time += timedelta(seconds=seconds)

    @property
    def error(self) -> float:
        """Seconds by which the estimate is ahead."""
        return (self.clock.now() - self.time).total_seconds()


@pytest.fixture
def server() -> Server:
    return Server()


def test_between_two_answers_the_monotonic_clock_goes_on(server: Server) -> None:
    server.answer()
    server.wait(3600)
    assert server.clock.now() == NOON + timedelta(hours=1)


def test_quick_answers_make_it_exact_to_a_second(server: Server) -> None:
    for _ in range(50):
        server.wait(0.37)
        server.answer(0.01, 0.01)
        assert -2 <= server.error <= 0


def test_a_slow_answer_does_not_move_it(server: Server) -> None:
    server.answer()
    for there, back in ((25, 0), (0, 25), (10, 10)):
        server.answer(there, back)
        assert -1 <= server.error <= 0


@pytest.mark.parametrize("hours", [1, -1])
def test_a_server_whose_clock_is_set_is_followed(server: Server, hours: int) -> None:
    server.answer()
    server.time += timedelta(hours=hours)
    server.answer(0.1, 0.1)
    assert -1 <= server.error <= 2


@pytest.mark.parametrize("date", [None, "", "yesterday", "Tue, 99 Nov 2026 12:00:00 GMT"])
def test_an_answer_without_a_date_teaches_nothing(server: Server, date: str | None) -> None:
    server.answer()
    server.clock.note(date, server.monotonic)
    assert server.error == 0


def test_before_the_first_answer_it_is_this_machines_clock(server: Server) -> None:
    assert abs(server.clock.now() - datetime.now(UTC)) < timedelta(seconds=5)
