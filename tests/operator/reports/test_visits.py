"""Connections to the progress server: who may enter, and who has to leave."""

import pytest

from finetune_operator.reports import limits
from finetune_operator.reports.limits import Allowances, Remembered
from finetune_operator.reports.visits import (
    CONNECTION_BURST,
    KEPT_SECONDS,
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_OF_PEER,
    MAX_KEPT,
    Address,
    Visits,
)


def _do_nothing() -> None:
    pass


class Door:
    """Open connections at a clock that the test sets, and those that were dismissed or kept."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.visits = Visits(clock=lambda: self.seconds)
        self.dismissed: list[Address] = []
        self.resting: list[Address] = []

    def enter(self, peer: str, port: int) -> bool:
        address = (peer, port)
        return self.visits.enter(address, lambda: self.dismissed.append(address), lambda: self.resting.append(address))

    def keep(self, peer: str, port: int) -> bool:
        """A report on a new connection that is accepted."""
        assert self.enter(peer, port)
        self.visits.receive((peer, port))
        return self.visits.keep((peer, port))


def test_a_peer_displaces_its_own_oldest_half_sent_request() -> None:
    door = Door()
    assert all(door.enter("10.0.0.1", port) for port in range(MAX_CONNECTIONS_OF_PEER))
    door.visits.receive(("10.0.0.1", 0))
    assert door.enter("10.0.0.1", 1000)
    assert door.dismissed == [("10.0.0.1", 1)]


def test_whole_requests_are_never_displaced() -> None:
    door = Door()
    for port in range(MAX_CONNECTIONS_OF_PEER):
        assert door.enter("10.0.0.1", port)
        door.visits.receive(("10.0.0.1", port))
    assert not door.enter("10.0.0.1", 1000)
    assert door.enter("10.0.0.2", 1)

    door.visits.end(("10.0.0.1", 0))
    assert door.enter("10.0.0.1", 1000)
    assert not door.dismissed


def test_a_full_house_dismisses_the_greediest_peer() -> None:
    door = Door()
    assert door.enter("10.0.0.200", 1)
    peers = -(-MAX_CONNECTIONS // MAX_CONNECTIONS_OF_PEER)
    addresses = [(f"10.0.0.{peer}", port) for port in range(MAX_CONNECTIONS_OF_PEER) for peer in range(peers)]
    assert all(door.enter(*address) for address in addresses[: MAX_CONNECTIONS - 1])

    assert door.enter("10.0.0.201", 1)
    assert door.dismissed == [("10.0.0.0", 0)]


def test_trainers_keep_their_connections_and_take_no_place_of_strangers() -> None:
    door = Door()
    assert all(door.keep(f"10.1.{number // 250}.{number % 250}", 1) for number in range(MAX_KEPT))
    assert len(door.resting) == MAX_KEPT
    assert not door.keep("10.2.0.1", 1), "one more is answered and closed"
    door.visits.end(("10.2.0.1", 1))

    assert all(door.enter(f"10.3.{number // 250}.{number % 250}", 1) for number in range(MAX_CONNECTIONS))
    assert not door.dismissed
    assert door.enter("10.4.0.1", 1)
    assert door.dismissed == [("10.3.0.0", 1)], "strangers displace strangers"

    # A further report on a kept connection needs no further place.
    door.visits.receive(("10.1.0.0", 1))
    assert door.visits.keep(("10.1.0.0", 1))


def test_a_peer_with_too_many_connections_loses_half_sent_requests_before_kept_ones() -> None:
    door = Door()
    assert all(door.keep("10.0.0.1", port) for port in range(MAX_CONNECTIONS_OF_PEER - 1))
    assert door.enter("10.0.0.1", 1000)
    assert door.enter("10.0.0.1", 1001)
    assert door.dismissed == [("10.0.0.1", 1000)]

    door.visits.receive(("10.0.0.1", 1001))
    assert door.enter("10.0.0.1", 1002)
    assert door.dismissed[1:] == [("10.0.0.1", 0)]


def test_a_kept_connection_ends_after_some_minutes() -> None:
    door = Door()
    assert door.keep("10.0.0.1", 1)
    door.seconds = KEPT_SECONDS + 1
    door.visits.receive(("10.0.0.1", 1))
    assert not door.visits.keep(("10.0.0.1", 1))


def test_a_peer_that_connects_too_often_is_refused_for_a_while() -> None:
    time = 0.0
    visits = Visits(clock=lambda: time)
    for port in range(int(CONNECTION_BURST)):
        assert visits.enter(("10.0.0.1", port), _do_nothing, _do_nothing)
        visits.end(("10.0.0.1", port))
    assert not visits.enter(("10.0.0.1", 1), _do_nothing, _do_nothing)
    assert visits.enter(("10.0.0.2", 1), _do_nothing, _do_nothing)

    time = 1.0
    assert visits.enter(("10.0.0.1", 1), _do_nothing, _do_nothing)


def test_what_is_remembered_ends_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_KEYS", 3)
    remembered: Remembered[int, str] = Remembered(seconds=10)
    for key in range(5):
        remembered.put(key, str(key), 0.0)
    assert [remembered.get(key, 9.0) for key in range(5)] == [None, None, "2", "3", "4"]
    assert remembered.get(4, 10.0) is None


def test_allowances_are_bounded_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_KEYS", 3)
    allowances: Allowances[int] = Allowances(burst=2, per_second=1)
    assert [allowances.take(1, 0.0) for _ in range(3)] == [True, True, False]
    assert allowances.take(1, 1.0)
    assert not allowances.take(1, 1.0)

    for key in range(2, 5):
        allowances.take(key, 1.0)
    assert allowances.take(1, 1.0)  # forgotten, so its bucket is full
