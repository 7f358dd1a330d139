"""Fault plans, generated from the requests and events that undisturbed lives of jobs were seen to cause.

A plan is one fault at one place of one kind of life: `passes/kill-commit/POST jobs/2` kills the operator after the API
server has committed the second Job of a life that passes, before its answer arrives.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

KILLS: Final = ("kill-before", "kill-commit", "kill-after", "late")
"""SIGKILL before a request arrives, before its answer, after it; `late`: the write arrives when the job is over."""

REFUSALS: Final = {"409": 409, "429": 429, "500": 500, "503": 503, "403": 403}
BREAKS: Final = ("reset", "reset-commit", "timeout", "timeout-commit")
"""Connections that break, or stay silent until the client gives up, before and after the request is served."""

EVENT_FAULTS: Final = ("drop", "duplicate", "delay", "reorder", "gone", "error", "half-open")
SLOW: Final = ("timeout", "timeout-commit", "half-open")
"""Faults that the operator notices after 30 to 70 s; `make test` leaves them out."""

_NAME: Final = re.compile(r"^(?P<life>[a-z]+)/(?P<fault>[a-z0-9-]+)/(?P<place>[A-Z]+ [a-z/]+)/(?P<number>\d+)$")
Trace = Mapping[str, int]
"""How often each kind of request or event ("PATCH finetunejobs/status", "EVENT pods") came in a life."""


@dataclass(frozen=True)
class Plan:
    """One fault, at the request or event number `number` of its place."""

    life: str
    fault: str
    place: str
    number: int

    @property
    def name(self) -> str:
        """The name by which the plan is run again."""
        return f"{self.life}/{self.fault}/{self.place}/{self.number}"

    @property
    def group(self) -> str:
        """The class of the plan in the table of results."""
        kind = "event" if self.place.startswith("EVENT") else "read" if _is_read(self.place) else "write"
        return f"{kind}: {self.fault}"

    @classmethod
    def parse(cls, name: str) -> "Plan":
        """Read a plan's name; raises ValueError."""
        found = _NAME.match(name)
        if found is None:
            raise ValueError(f"{name!r} names no plan; write LIFE/FAULT/PLACE/NUMBER, as in faults.csv")
        return cls(found["life"], found["fault"], found["place"], int(found["number"]))


def generate(life: str, traces: Iterable[Trace]) -> list[Plan]:
    """Every plan of a life, for the places that all of its references passed."""
    seen = list(traces)
    common = {place: min(trace.get(place, 0) for trace in seen) for place in seen[0]}
    return [
        Plan(life, fault, place, number)
        for place, count in sorted(common.items())
        for number in _numbers(place, count)
        for fault in _faults(place)
    ]


def sample(plans: Iterable[Plan], count: int, seed: int) -> list[Plan]:
    """A sample in which every class comes in turn, so that rare ones are in it too; the seed decides it."""
    groups: dict[str, list[Plan]] = defaultdict(list)
    for plan in sorted(plans, key=lambda each: each.name):
        groups[plan.group].append(plan)

    chosen: list[Plan] = []
    dice = random.Random(seed)
    for group in groups.values():
        dice.shuffle(group)
    while len(chosen) < count and any(groups.values()):
        chosen += [group.pop() for group in groups.values() if group]
    return chosen[:count]


def count_places(places: Iterable[str]) -> Trace:
    """The trace of the places that a life passed."""
    return Counter(places)


def _is_read(place: str) -> bool:
    return place.startswith(("GET", "LIST"))


def _numbers(place: str, count: int) -> Iterable[int]:
    # Reads and events repeat: the first, the middle and the last stand for all.
    return range(1, count + 1) if not _is_read(place) else sorted({1, (count + 1) // 2, count} - {0})


def _faults(place: str) -> tuple[str, ...]:
    if place.startswith("EVENT"):
        return EVENT_FAULTS
    if _is_read(place):
        return (*REFUSALS.keys() - {"409"}, "reset", "timeout", "kill-before")
    # An Event that "exists already", or that may not be posted, is let go by design: nothing depends on it.
    refusals = REFUSALS.keys() - ({"409", "403"} if place == "POST events" else set())
    return (*KILLS, *refusals, *BREAKS)
