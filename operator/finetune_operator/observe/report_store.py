"""Progress reports between their arrival and the next status write: the newest of each job, in memory.

Reports arrive every few seconds, but each status write costs the API server a write to etcd, and makes an event that
has the job looked at again. So a look at a job does not see every report: the next one is shown `SHOW_SECONDS` after
the one before, or at once if it comes from another pod or stage.

Losing them costs only a few seconds of progress: the trainer reports again, and the end of a run travels in the pod's
termination message.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from finetune_api.progress import ProgressReport

SHOW_SECONDS = 10.0
LAST_HEARD = 8  # jobs


@dataclass(frozen=True)
class ReceivedReport:
    """A report, the pod that sent it and the time at which it arrived."""

    pod_uid: str
    received: datetime
    report: ProgressReport

    def continues(self, earlier: "ReceivedReport") -> bool:
        """True if the earlier report came from the same pod in the same stage."""
        stages = (self.report.finetune.stage, earlier.report.finetune.stage)
        return self.pod_uid == earlier.pod_uid and stages[0] == stages[1]


@dataclass(frozen=True)
class Heard:
    """A pod that proved who it is, and the time; its report may have been refused, as one of a newer version is."""

    pod_uid: str
    time: datetime


@dataclass(frozen=True)
class Channel:
    """The way of a job's reports."""

    listening_since: datetime | None = None
    """Time since which the operator leads and reaches its own progress server; None while it does not."""

    heard: Heard | None = None
    """The pod of the job that was heard last; None if none was heard since then."""

    others_heard: datetime | None = None
    """Time at which any other job that is not over was heard; None if none was."""


@dataclass
class _Entry:
    newest: ReceivedReport | None = None
    heard: Heard | None = None
    shown: ReceivedReport | None = None
    shown_at: float = 0.0
    """Clock reading, in seconds, at which `shown` was shown first."""

    locked: bool = False


class ReportStore:
    """The newest report of each job, by the job's UID. A locked job accepts no more reports, because its terminal
    status is being written or has been."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._listening_since: datetime | None = None
        self._last_heard: dict[str, datetime] = {}

    def listen(self, now: datetime) -> None:
        """Counts silence from now on: nobody was heard before."""
        self._listening_since = now

    def channel(self, job_uid: str) -> Channel:
        """Returns what is known about the way of a job's reports."""
        own = self._entries.get(job_uid)
        others_heard = next((time for uid, time in reversed(self._last_heard.items()) if uid != job_uid), None)
        return Channel(self._listening_since, own.heard if own else None, others_heard)

    def hear(self, job_uid: str, pod_uid: str, now: datetime) -> None:
        """Notes that a pod has sent something."""
        self._entries.setdefault(job_uid, _Entry()).heard = Heard(pod_uid, now)

        # Newest last. Of all jobs but one, the newest is enough; a few more, as some of them end.
        self._last_heard.pop(job_uid, None)
        self._last_heard[job_uid] = now
        if len(self._last_heard) > LAST_HEARD:
            self._last_heard.pop(next(iter(self._last_heard)))

    def newest(self, job_uid: str) -> ReceivedReport | None:
        """Returns the newest report of a job."""
        entry = self._entries.get(job_uid)
        return entry.newest if entry else None

    def show(self, job_uid: str) -> ReceivedReport | None:
        """Returns the report that the status of a job is to say now: the newest, or for a while the one before."""
        entry = self._entries.get(job_uid)
        if entry is None:
            return None

        if self.seconds_until_shown(job_uid) == 0:
            entry.shown, entry.shown_at = entry.newest, self._clock()
        return entry.shown

    def seconds_until_shown(self, job_uid: str) -> float | None:
        """Returns the seconds until the newest report of a job is shown; None if it has been, or if there is none."""
        entry = self._entries.get(job_uid)
        if entry is None or entry.newest is None or entry.newest is entry.shown:
            return None
        if entry.shown is None or not entry.newest.continues(entry.shown):
            return 0.0
        return max(0.0, entry.shown_at + SHOW_SECONDS - self._clock())

    def put(self, job_uid: str, report: ReceivedReport) -> None:
        """Keeps a report that has passed every check."""
        self._entries.setdefault(job_uid, _Entry()).newest = report

    def lock(self, job_uid: str) -> None:
        """Refuses every later report of a job. The newest one stays, for the terminal status."""
        self._entries.setdefault(job_uid, _Entry()).locked = True
        self._last_heard.pop(job_uid, None)

    def drop(self, job_uid: str) -> None:
        """Forgets the report of a job whose terminal status is written, and keeps the job locked."""
        entry = self._entries.setdefault(job_uid, _Entry(locked=True))
        entry.newest = entry.shown = None

    def is_locked(self, job_uid: str) -> bool:
        """True if a job accepts no more reports."""
        entry = self._entries.get(job_uid)
        return entry is not None and entry.locked

    def clear(self) -> None:
        """Removes everything about every job."""
        self._entries.clear()
        self._last_heard.clear()

    def forget(self, job_uid: str) -> None:
        """Removes everything about a job that is gone."""
        self._entries.pop(job_uid, None)
        self._last_heard.pop(job_uid, None)
