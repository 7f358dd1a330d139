"""Retries with exponential backoff: one loop for every request to S3 and to the Hugging Face Hub.

botocore repeats a request up to four times inside it (`s3_session.py`).

How long a failure is retried depends on its cause: an outage for minutes, expired credentials until the mounted Secret
changes, a refusal not at all. stamina and tenacity were rejected: stamina has one time limit for a call, whatever
failed; tenacity would need our own functions for the limit, the wait and the error, so only the loop would be saved.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum, auto
from functools import partial
from typing import Any, TypeVar

from finetune_trainer.errors import TrainerError
from finetune_trainer.signs_of_life import beat
from finetune_trainer.stopping import run_abandonable
from finetune_trainer.storage.disk_faults import explain_disk_fault

log = logging.getLogger(__name__)
Value = TypeVar("Value")


class Cause(Enum):
    """Causes of a failure, as far as retries differ."""

    OUTAGE = auto()
    """The other side does not answer, or asks to slow down."""
    EXPIRED = auto()
    """The credentials have expired."""
    REJECTED = auto()
    """The credentials were rejected."""
    PERMANENT = auto()
    """A repeated request would fail again."""


@dataclass(frozen=True)
class RetryPolicy:
    """Time for which a request is retried, by cause, and the waits between its attempts, in seconds."""

    outage_seconds: float = 900
    expired_seconds: float = 300
    """Time for the kubelet to replace the mounted Secret."""
    rejected_seconds: float = 2
    """Time in which a Secret's files may change one after the other."""
    first_wait: float = 0.5
    max_wait: float = 30

    def limit(self, cause: Cause) -> float:
        """Seconds for which failures with this cause are retried, counted from the first attempt."""
        limits = {
            Cause.OUTAGE: self.outage_seconds,
            Cause.EXPIRED: self.expired_seconds,
            Cause.REJECTED: self.rejected_seconds,
        }
        return limits.get(cause, 0.0)


HUB_RETRIES = RetryPolicy(outage_seconds=120, first_wait=1)
"""Retries of requests to the Hugging Face Hub in a pod."""


def retry(
    action: Callable[[], Value],
    policy: RetryPolicy,
    errors: tuple[type[Exception], ...],
    explain: Callable[[Exception], tuple[TrainerError, Cause]],
    closing: threading.Event | None = None,
) -> Value:
    """Returns what `action` returns; repeats it while it raises one of `errors` and the policy allows it.

    A server that says how long to wait (Retry-After) is not asked sooner, and not again if that is beyond the limit.
    Raises the error that `explain` makes of the last failure, without the original, which may quote the request. Once
    `closing` is set, failures are raised at once, and those of this disk always are. A request to stop waits for no
    answer: InterruptedRunError.
    """
    closing = closing or threading.Event()
    began, wait = time.monotonic(), policy.first_wait

    while True:
        try:
            value = run_abandonable(action)
            beat()
            return value
        except errors as error:
            beat()  # a failure is an answer too, and the policy bounds how long it is waited for another one
            if (fault := explain_disk_fault(error)) is not None:
                raise fault from None
            failure, cause = explain(error)

            # Credentials are polled at a steady pace: their files change once, at no predictable time.
            polls = cause in (Cause.EXPIRED, Cause.REJECTED)
            pause = (policy.first_wait if polls else wait) * random.uniform(0.7, 1)  # noqa: S311 (spreads many pods)
            pause = max(pause, asked_wait(error))
            if closing.is_set() or time.monotonic() + pause > began + policy.limit(cause):
                raise failure from None

        log.warning("%s; trying again in %.1f s", failure.message, pause)
        run_abandonable(partial(closing.wait, pause))
        wait = wait if polls else min(2 * wait, policy.max_wait)


def asked_wait(error: Exception) -> float:
    """Seconds that the server asked to wait, by the header Retry-After of its answer; 0 if it did not.

    `error` is httpx's or botocore's; both of the header's forms are read, a number of seconds and a date.
    """
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    else:
        headers = getattr(response, "headers", {})

    asked = str(headers.get("retry-after", "")).strip()
    if asked.isdecimal():
        return float(asked)
    try:
        until = parsedate_to_datetime(asked)
    except ValueError:
        return 0.0
    # A date without a zone is of one that nobody knows.
    return max(0.0, (until - datetime.now(UTC)).total_seconds()) if until.tzinfo else 0.0
