"""Tells whether the GPU waits for the host: graphs help where launching kernels takes longer than what they do.

A host that is the faster one is many layers ahead of its GPU when it has launched the last. So it is asked then whether
the GPU has done what was launched a few layers ago.
"""

from collections.abc import Callable
from typing import Protocol

import torch

LAG = 2
"""Layers that the host is ahead of a GPU that waits for it, at most."""


class Event(Protocol):
    """A place in the work of the GPU."""

    def record(self) -> None:
        """Takes the place behind everything that has been launched."""
        ...

    def query(self) -> bool:
        """True if the GPU has come past the place; does not wait."""
        ...


class Pace(Protocol):
    """The way in which host and GPU keep up with each other, pass by pass."""

    gpu_waits: bool
    """True if the GPU has waited in the pass before."""

    def launched(self, left: int) -> None:
        """Takes note that a layer has been launched, and `left` layers of the pass have not."""
        ...


class HostPace:
    """The pace of a GPU."""

    def __init__(self, new_event: Callable[[], Event] = torch.cuda.Event) -> None:
        self._new_event = new_event
        self._event: Event | None = None
        self.gpu_waits = False

    def launched(self, left: int) -> None:
        """Looks at the last layers of a pass; see `Pace`."""
        if left == LAG:
            self._event = self._new_event()
            self._event.record()
        elif left == 0:
            self.gpu_waits = self._event is not None and self._event.query()
            self._event = None
