"""Fault plans, generated from the requests and events that undisturbed lives of jobs were seen to cause.

A plan is one fault at one place of one kind of life: `passes/kill-commit/POST jobs/2` kills the operator after the API
server has committed the second Job of a life that passes, before its answer arrives.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

KILLS: Final = ("kill-before", "kill-commit", "kill-after", "late")
"""SIGKILL before a request arrives, before its answer, after it; `late`: the write arrives when the job is over."""

REFUSALS: Final = {"409": 409, "429": 429, "500": 500, "503": 503, "403": 403}
BREAKS: Final = ("reset", "reset-commit", "timeout", "timeout-commit")
"""Connections that break, or stay silent until the client gives up, before and after the request is served."""

STALE: Final = "stale"
"""A list as it was some versions ago, as from an API server whose cache lags behind."""

EVENT_FAULTS: Final = ("drop", "duplicate", "delay", "reorder", "gone", "error", "half-open", STALE)
SLOW: Final = ("timeout", "timeout-commit", "half-open", STALE)
"""Faults that the operator notices after 30 to 120 s: such plans begin first."""


class Lane(Enum):
    """Plans that share operators, by what each does to the lives of the others."""

    REQUESTS = auto()
    """Only the plan's own job feels it: the watches are whole."""

    EVENTS = auto()
    """A watch begins anew for all."""

    SILENCES = auto()
    """A watch is silent or a list is old, for all and for minutes."""

    KILLS = auto()
    """The operator of all dies."""


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

    @property
    def lane(self) -> "Lane":
        """Which operators the plan may be tried with."""
        if self.fault in KILLS:
            return Lane.KILLS
        if not self.place.startswith("EVENT"):
            return Lane.REQUESTS
        return Lane.SILENCES if self.fault in SLOW else Lane.EVENTS

    @property
    def let_go(self) -> int:
        """Events that are let go by design: one that "exists already" or may not be posted. Nothing depends on it."""
        return int(self.place == "POST events" and self.fault in ("409", "403"))

    @classmethod
    def parse(cls, name: str) -> "Plan":
        """Read a plan's name; raises ValueError."""
        found = _NAME.match(name)
        if found is None:
            raise ValueError(f"{name!r} names no plan; write LIFE/FAULT/PLACE/NUMBER, as in faults.csv")
        return cls(found["life"], found["fault"], found["place"], int(found["number"]))


def generate(life: str, traces: Iterable[Trace], faults_of: Callable[[str], Iterable[str]] | None = None) -> list[Plan]:
    """Every plan of a life, for the places that all of its references passed. `faults_of`: the faults of a place; those
    of the API server if it is left out."""
    seen = list(traces)
    common = {place: min(trace.get(place, 0) for trace in seen) for place in seen[0]}
    return [
        Plan(life, fault, place, number)
        for place, count in sorted(common.items())
        for number in _numbers(place, count)
        for fault in (faults_of or _faults)(place)
    ]


def sample(plans: Iterable[Plan], count: int, seed: int) -> list[Plan]:
    """A sample in which every class comes in turn, and of it the life that came least; the seed decides the rest."""
    groups: dict[str, list[Plan]] = defaultdict(list)
    for plan in sorted(plans, key=lambda each: each.name):
        groups[plan.group].append(plan)
    dice = random.Random(seed)
    for group in groups.values():
        dice.shuffle(group)

    chosen: list[Plan] = []
    lives: Counter[str] = Counter()
    while len(chosen) < count and any(groups.values()):
        for group in filter(None, groups.values()):
            plan = min(group, key=lambda each: lives[each.life])
            group.remove(plan)
            lives[plan.life] += 1
            chosen.append(plan)
    return chosen[:count]


def crash_points(plans: Iterable[Plan], life: str) -> list[Plan]:
    """The kills around every write of a life: before it arrives, and once it is committed."""
    kills = ("kill-before", "kill-commit")
    return [plan for plan in plans if plan.life == life and plan.fault in kills and plan.group.startswith("write")]


def count_places(places: Iterable[str]) -> Trace:
    """The trace of the places that a life passed."""
    return Counter(places)


def count_writes(places: Iterable[str]) -> int:
    """The writes among the places that a life passed."""
    return sum(1 for place in places if not place.startswith("EVENT") and not _is_read(place))


def _is_read(place: str) -> bool:
    return place.startswith(("GET", "LIST"))


def _numbers(place: str, count: int) -> Iterable[int]:
    if not _is_read(place):
        return range(1, count + 1)
    # Reads repeat, so a few stand for all. How many there are differs by life: the last may not come in the next one.
    return sorted({1, (count + 1) // 2, 3 * count // 4} - {0})


def _faults(place: str) -> tuple[str, ...]:
    if place.startswith("EVENT"):
        return EVENT_FAULTS
    if _is_read(place):
        old = (STALE,) if place.startswith("LIST") else ()
        return (*REFUSALS.keys() - {"409"}, "reset", "timeout", "kill-before", *old)
    return (*KILLS, *REFUSALS, *BREAKS)
