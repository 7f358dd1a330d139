"""Tells a loss that has exploded from one that is noisy: for many steps in a row far above the best of the run.

A step is bad if its loss is above three times the lowest mean of 20 steps so far, and at least one nat above it. Single
bad steps are usual (an odd batch), so it takes 20 in a row; 5 at the end of a run, whose result would be published. A
model that has collapsed predicts no better than by chance, which is 10 to 12 nats with a vocabulary of today.
"""

from collections import deque
from collections.abc import Iterable
from statistics import fmean

WINDOW = 20
"""Steps of a mean."""

FACTOR, MARGIN = 3.0, 1.0
"""A bad step is above FACTOR times the best mean, and MARGIN nats above it: a loss near 0 may triple by chance."""

PATIENCE, PATIENCE_AT_THE_END = 20, 5
"""Bad steps in a row."""


class LossHistory:
    """Losses of one run, step by step."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._best: float | None = None
        self._bad = 0
        self.bad_since: int | None = None
        """First step of the bad ones that go on; None after a good step."""

    def restore(self, means: Iterable[float], steps: int) -> None:
        """Takes over the logged losses of the run that goes on; each is a mean over so many `steps`."""
        self._recent.clear()
        window: deque[float] = deque(maxlen=max(1, WINDOW // steps))
        for mean in means:
            window.append(mean)
            if len(window) == window.maxlen:
                self._best = min(fmean(window), self._best if self._best is not None else mean)

    def add(self, step: int, loss: float) -> str | None:
        """Adds the loss of a step; returns a sentence if it is one bad step too many."""
        if self._best is not None and loss > max(FACTOR * self._best, self._best + MARGIN):
            self.bad_since = step if self.bad_since is None else self.bad_since
            self._bad += 1
            return self._describe(step, loss) if self._bad >= PATIENCE else None

        self._bad, self.bad_since = 0, None
        self._recent.append(loss)
        if len(self._recent) == WINDOW:
            mean = fmean(self._recent)
            self._best = mean if self._best is None else min(self._best, mean)
        return None

    def judge_end(self, step: int) -> str | None:
        """Returns a sentence if the run ends with bad steps."""
        return self._describe(step) if self._bad >= PATIENCE_AT_THE_END else None

    def _describe(self, step: int, loss: float | None = None) -> str:
        now = "the run ends with a loss that" if loss is None else f"the loss is {loss:.3g} at step {step}, and"
        return (
            f"{now} has been far above the run's own best since step {self.bad_since}: {WINDOW} steps before had a "
            f"mean of {self._best:.3g}"
        )
