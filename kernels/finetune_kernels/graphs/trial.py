"""Tells whether passes take less time since they are launched as graphs.

Graphs save what the host does. But a pack is recorded with empty rows and with room for more documents, so where the
host is slower than its GPU by little, graphs can cost more than they save. So passes of a shape are on trial when they
have been recorded: the GPU's own clock compares them with the last ones that were launched kernel by kernel.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from finetune_kernels.graphs.pass_shape import PassShape

PASSES = 5
"""Passes of either kind that are compared."""


class TimedEvent(Protocol):
    """A place in the work of the GPU, with its time."""

    def record(self) -> None:
        """Takes the place behind everything that has been launched."""
        ...

    def query(self) -> bool:
        """True if the GPU has come past the place; does not wait."""
        ...

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from here to `end`, another such place, once the GPU has come past both."""
        ...


class TimedPass(NamedTuple):
    """The time of one forward pass through all layers."""

    shape: PassShape
    is_recorded: bool
    """True if it was launched as graphs."""
    milliseconds: float
    """Of a token."""


def _timed_event() -> TimedEvent:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class PassTimes(Protocol):
    """Takes the times of forward passes."""

    def begin(self, shape: PassShape, tokens: int, *, is_recorded: bool) -> None:
        """Begins a pass of `tokens` tokens; one that has not ended is forgotten."""
        ...

    def end(self) -> None:
        """Ends the pass that has begun: its last layer has been launched."""
        ...

    def forget(self) -> None:
        """Forgets the passes that have ended."""
        ...

    def done(self) -> Iterable[TimedPass]:
        """Returns the passes that have been done since it was asked last, in their order."""
        ...


class GpuPassTimes:
    """The times by the GPU's clock; see `PassTimes`. Waits for no pass."""

    def __init__(self, new_event: Callable[[], TimedEvent] = _timed_event) -> None:
        self._new_event = new_event
        self._begun: tuple[PassShape, bool, int, TimedEvent]
        self._ended: deque[tuple[PassShape, bool, int, TimedEvent, TimedEvent]] = deque()

    def begin(self, shape: PassShape, tokens: int, *, is_recorded: bool) -> None:
        """Begins a pass of `tokens` tokens; one that has not ended is forgotten."""
        start = self._new_event()
        start.record()
        self._begun = shape, is_recorded, tokens, start

    def end(self) -> None:
        """Ends the pass that has begun: its last layer has been launched."""
        end = self._new_event()
        end.record()
        self._ended.append((*self._begun, end))

    def forget(self) -> None:
        """Forgets the passes that have ended."""
        self._ended.clear()

    def done(self) -> Iterator[TimedPass]:
        """Yields the passes that the GPU has done since it was asked last, in their order."""
        while self._ended and self._ended[0][-1].query():
            shape, is_recorded, tokens, start, end = self._ended.popleft()
            yield TimedPass(shape, is_recorded, start.elapsed_time(end) / tokens)


class Trial:
    """Passes of one shape: their times a token, kernel by kernel and as graphs."""

    def __init__(self) -> None:
        self._times: dict[bool, deque[float]] = {kind: deque(maxlen=PASSES) for kind in (False, True)}

    @property
    def is_over(self) -> bool:
        """True once as many passes as are compared have been launched as graphs."""
        return len(self._times[True]) == PASSES

    def note(self, took: TimedPass) -> bool:
        """Takes note of a pass, unless the trial is over; returns True if it ends the trial."""
        if self.is_over:
            return False
        self._times[took.is_recorded].append(took.milliseconds)
        return self.is_over

    @property
    def gain(self) -> float:
        """Speed as graphs over that kernel by kernel: the quickest time there over the median here, as packs differ and
        graphs have to be worth their memory. Raises ValueError before the trial is over."""
        if not self.is_over:
            raise ValueError("too few passes were launched as graphs")
        kernels, graphs = self._times[False], self._times[True]
        return min(kernels) / statistics.median(graphs) if kernels else 1.0

    @property
    def is_lost(self) -> bool:
        """True if graphs have turned out to be no faster."""
        return self.is_over and self.gain < 1.0
