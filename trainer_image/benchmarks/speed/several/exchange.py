"""Time of one step that the ranks' exchange takes, from the profiler's spans of each rank. Pure.

all-reduce    time of the collective on the rank that came last: nobody waits for that one
waiting       what the first rank's all-reduces take longer: it waits for the slowest
gathers       time in which layers are gathered
exposed       of these, the time in which nothing else runs on the GPU: what the gathers cost
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from speed.step_profile import Span

REDUCES, GATHERS = "allreduce", "allgather"


class Exchange(NamedTuple):
    """Milliseconds of one rank's step."""

    reduces: float
    gathers: float
    exposed: float

    @classmethod
    def of(cls, spans: Sequence[Span]) -> "Exchange":
        """Adds up the spans of one rank's step."""
        gathers = [span for span in spans if GATHERS in span.name.lower()]
        others = [span for span in spans if "nccl" not in span.name.lower()]
        reduces = [span for span in spans if REDUCES in span.name.lower()]
        exposed = covered([*gathers, *others]) - covered(others)
        return cls(covered(reduces), covered(gathers), exposed)


def summarise_exchange(ranks: Sequence[Exchange]) -> dict[str, float]:
    """Returns the figures of a step over all ranks, in milliseconds."""
    reduces = [rank.reduces for rank in ranks]
    return {
        "all_reduce_ms": round(min(reduces), 2),
        "waiting_ms": round(max(reduces) - min(reduces), 2),
        "gathers_ms": round(max(rank.gathers for rank in ranks), 1),
        "exposed_gathers_ms": round(max(rank.exposed for rank in ranks), 1),
    }


def covered(spans: Iterable[Span]) -> float:
    """Milliseconds in which at least one of the spans runs."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda one: one.begin):
        total += max(0.0, span.end - max(span.begin, end))
        end = max(end, span.end)
    return total / 1e3
