"""Who leads, under every interleaving that a search finds: never two at once, and always one in the end.

The world of the search: three replicas whose clocks are set differently and run up to a tenth fast or slow; requests
that take their time in both directions, that are lost before or after the API server has committed them, and replicas
that stop for a while in between.
"""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.election import election as module
from finetune_operator.election.election import LEASE_SECONDS, RENEW_DEADLINE_SECONDS, Election
from finetune_operator.election.record import ADDRESS_ANNOTATION, LeaseRecord

REPLICAS = ("a", "b", "c")
WALL = "2026-11-27T00:00:00.000000Z"  # never compared, so it may as well stand still


@dataclass
class World:
    """True time, and the Lease as the API server has it."""

    time: float = 0.0
    stored: LeaseRecord | None = None
    writes: int = 0

    def write(self, record: LeaseRecord) -> LeaseRecord | None:
        """Stores a record under the version that it names; None if that is not the newest (409)."""
        if record.version != (self.stored.version if self.stored else ""):
            return None
        self.writes += 1
        self.stored = replace(record, version=str(self.writes))
        return self.stored


@dataclass
class Replica:
    """One replica with its own clock, and what it waits for."""

    name: str
    world: World
    offset: float
    rate: float
    election: Election = field(init=False)
    _sent: tuple[LeaseRecord, float] | None = None
    _answer: tuple[LeaseRecord, float] | None = None

    def __post_init__(self) -> None:
        self.election = Election(self.name, f"{self.name}:8443", lambda: self.offset + self.rate * self.world.time)

    def read(self) -> None:
        """Reads the Lease, and sends a claim if the election says so."""
        self._sent = self._answer = None
        self.election.see(self.world.stored)
        claim = self.election.claim(WALL)
        if claim is not None:
            self._sent = claim, self.election.read_clock()

    def commit(self) -> None:
        """The API server takes the claim in, if it is on the way."""
        if self._sent is not None:
            claim, sent = self._sent
            stored, self._sent = self.world.write(claim), None
            self._answer = (stored, sent) if stored else None

    def answer(self) -> None:
        """The API server's answer arrives, if there is one."""
        if self._answer is not None:
            self.election.won(*self._answer)
            self._answer = None

    def lose(self) -> None:
        """Whatever is on the way gets lost, or the client gives up waiting for it."""
        self._answer = None

    def hand_over(self) -> None:
        """Stops working, then gives the Lease up."""
        record = self.election.resign(WALL)
        if record is not None:
            self.world.write(record)


STEPS = ("read", "commit", "answer", "lose", "hand_over")
step = st.tuples(
    st.sampled_from((*STEPS, "read", "commit", "answer")),  # a claim needs three of them in a row
    st.sampled_from(REPLICAS),
    st.sampled_from((0.0, 0.0, 0.01, 1.0, 3.0, 7.9, 8.1, 12.1, 13.5, 30.0)),
)
clock = st.tuples(st.floats(-1e6, 1e6), st.floats(0.9, 1.1))


def live(clocks: list[tuple[float, float]], steps: list[tuple[str, str, float]]) -> list[str]:
    """Plays the steps; returns the times at which more than one replica led."""
    world = World()
    replicas = {name: Replica(name, world, *each) for name, each in zip(REPLICAS, clocks, strict=True)}
    found = []
    for action, name, seconds in steps:
        world.time += seconds
        getattr(replicas[name], action)()
        leading = [each.name for each in replicas.values() if each.election.is_leading()]
        if len(leading) > 1:
            found.append(f"{world.time:.2f} s: {leading}")
    return found


@settings(max_examples=400, deadline=None)
@given(st.lists(clock, min_size=3, max_size=3), st.lists(step, max_size=60))
def test_two_never_lead_at_once(clocks: list[tuple[float, float]], steps: list[tuple[str, str, float]]) -> None:
    assert live(clocks, steps) == []


SAME_CLOCKS = [(0.0, 1.0)] * 3
TAKEN_BY_A = [("read", "a", 0.0), ("commit", "a", 0.0), ("answer", "a", 0.0), ("read", "b", 0.0)]
LATE = [("read", "b", 12.1), ("commit", "b", 0.0), ("answer", "b", 0.0)]


def test_the_search_sees_a_deadline_that_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    assert live(SAME_CLOCKS, TAKEN_BY_A + LATE) == []
    monkeypatch.setattr(module, "RENEW_DEADLINE_SECONDS", 13.0)
    assert live(SAME_CLOCKS, TAKEN_BY_A + LATE) == ["12.10 s: ['a', 'b']"]


def test_the_search_sees_a_renewal_that_counts_from_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [("read", "a", 0.0), ("commit", "a", 0.0), ("read", "b", 0.0), ("answer", "a", 7.0)]
    late = [("read", "b", 5.1), ("commit", "b", 0.0), ("answer", "b", 0.0)]
    assert live(SAME_CLOCKS, slow + late) == []
    won = Election.won
    monkeypatch.setattr(Election, "won", lambda self, record, sent: won(self, record, self.read_clock()))
    assert live(SAME_CLOCKS, slow + late) == ["12.10 s: ['a', 'b']"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def seen_by(identity: str, *, holder: str = "a", seconds: int = LEASE_SECONDS) -> tuple[Election, Clock, LeaseRecord]:
    """An election that has just read a Lease."""
    clock = Clock()
    election = Election(identity, f"{identity}:8443", clock)
    record = LeaseRecord(holder, f"{holder}:8443", seconds, WALL, WALL, 3, "7")
    election.see(record)
    return election, clock, record


def test_a_lease_is_taken_once_it_did_not_change_for_its_own_duration() -> None:
    election, clock, record = seen_by("b", seconds=20)
    assert election.claim(WALL) is None
    assert election.leader_address == "a:8443"
    clock.now = 19
    election.see(replace(record, version="8"))
    clock.now = 39
    election.see(replace(record, version="8"))
    assert election.claim(WALL) is None
    clock.now = 39.1
    claim = election.claim("later")
    assert claim == LeaseRecord("b", "b:8443", LEASE_SECONDS, "later", "later", 4, "8")


def test_a_lease_that_was_handed_over_or_never_was_is_taken_at_once() -> None:
    election, _, _ = seen_by("b", holder="")
    assert election.claim(WALL) is not None
    fresh = Election("b", "b:8443", Clock())
    assert fresh.claim(WALL) is None, "nothing is known yet"
    fresh.see(None)
    claim = fresh.claim(WALL)
    assert claim is not None
    assert (claim.version, claim.transitions) == ("", 0)


def test_a_leader_stands_down_before_others_may_lead_and_may_come_back() -> None:
    election, clock, record = seen_by("a")
    election.won(replace(record, version="8"), sent=0.0)
    assert election.is_leading()
    clock.now = RENEW_DEADLINE_SECONDS
    assert not election.is_leading()
    assert election.leader_address == "", "it does not pass reports on to itself"
    claim = election.claim("later")
    assert claim == replace(record, version="8", renewed="later"), "nobody else has taken it"


def test_a_leader_that_sees_another_holder_stands_down_at_once() -> None:
    election, _, record = seen_by("a")
    election.won(record, sent=0.0)
    election.see(replace(record, holder="b", version="9"))
    assert not election.is_leading()
    assert election.resign(WALL) is None


def test_a_record_survives_the_way_through_the_api_server() -> None:
    record = LeaseRecord("a", "10.0.0.1:8443", 12, WALL, WALL, 3, "7")
    body = record.to_wire("system")
    assert body["metadata"]["annotations"] == {ADDRESS_ANNOTATION: "10.0.0.1:8443"}
    assert LeaseRecord.parse(body) == record
    somebody_elses = {"metadata": {"name": "finetune-operator", "resourceVersion": "1"}, "spec": {}}
    assert LeaseRecord.parse(somebody_elses).holder == ""


def test_a_reign_lasts_until_another_replica_leads() -> None:
    clock = [0.0]
    mine, other = Election("a", "a:8443", lambda: clock[0]), Election("b", "b:8443", lambda: clock[0])
    world = World()

    def take(election: Election, wall: str) -> str:
        election.see(world.stored)
        claim = election.claim(wall)
        assert claim is not None
        stored = world.write(claim)
        assert stored is not None
        election.won(stored, clock[0])
        assert election.is_leading()
        return election.reign

    first = take(mine, "2026-11-27T00:00:00.000000Z")
    clock[0] += RENEW_DEADLINE_SECONDS + 1
    assert not mine.is_leading()
    assert take(mine, "2026-11-27T00:00:09.000000Z") == first, "nobody else has led"

    other.see(world.stored)
    clock[0] += LEASE_SECONDS + 1
    take(other, "2026-11-27T00:00:22.000000Z")
    mine.see(world.stored)
    clock[0] += LEASE_SECONDS + 1
    assert take(mine, "2026-11-27T00:00:35.000000Z") != first
