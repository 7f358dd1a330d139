"""Limits of a run that no longer gets on: what trainer and operator have to agree on.

The trainer watches itself: nothing done for `StallLimit.seconds`, and it ends with reason Stalled. Where it cannot, as
when its process is frozen or its node hangs, it is silent: a trainer reports at least every `heartbeat_seconds`, so the
operator notices.
"""

from datetime import timedelta
from typing import Annotated, Self

from pydantic import Field

from finetune_api.base import ApiModel

DEFAULT_STALL_SECONDS = 1800
"""Longer than the longest wait that trainers end themselves, 900 s for a store that does not answer."""

MAX_HEARTBEAT_SECONDS = 60.0
MAX_MARGIN_SECONDS = 120.0
MAX_PATIENCE_SECONDS = 300.0


class StallLimit(ApiModel):
    """Time without a sign of life after which a run counts as stalled."""

    seconds: Annotated[int, Field(ge=1)]
    adapts: bool
    """True if the trainer may raise the limit for a run whose steps take long."""

    @classmethod
    def of(cls, wanted: int | None) -> Self:
        """Returns the limit for `spec.runPolicy.stallTimeoutSeconds`; None is the default, which adapts."""
        return cls(seconds=wanted or DEFAULT_STALL_SECONDS, adapts=wanted is None)

    @property
    def heartbeat_seconds(self) -> float:
        """Longest time between two reports of a trainer that lives, whatever it does."""
        return min(MAX_HEARTBEAT_SECONDS, self.seconds / 4)

    @property
    def silence(self) -> timedelta:
        """Time without a report after which a job says so: later than a trainer ends itself."""
        return timedelta(seconds=self.seconds + min(MAX_MARGIN_SECONDS, self.seconds / 4))

    @property
    def patience(self) -> timedelta:
        """Further time, in which an SRE can look, until the silent pod is removed."""
        return timedelta(seconds=min(MAX_PATIENCE_SECONDS, self.seconds / 2))
