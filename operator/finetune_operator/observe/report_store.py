"""Progress reports between their arrival and the next status write: the newest of each job, in memory.

Losing them costs only a few seconds of progress: the trainer reports again, and the end of a run travels in the pod's
termination message.
"""

from dataclasses import dataclass
from datetime import datetime

from finetune_api.progress import ProgressReport


@dataclass(frozen=True)
class ReceivedReport:
    """A report, the pod that sent it and the time at which it arrived."""

    pod_uid: str
    received: datetime
    report: ProgressReport


@dataclass
class _Entry:
    newest: ReceivedReport | None = None
    locked: bool = False


class ReportStore:
    """The newest report of each job, by the job's UID. A locked job accepts no more reports, because its terminal
    status is being written or has been."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def newest(self, job_uid: str) -> ReceivedReport | None:
        """Returns the newest report of a job."""
        entry = self._entries.get(job_uid)
        return entry.newest if entry else None

    def put(self, job_uid: str, report: ReceivedReport) -> None:
        """Keeps a report that has passed every check."""
        self._entries.setdefault(job_uid, _Entry()).newest = report

    def lock(self, job_uid: str) -> None:
        """Refuses every later report of a job. The newest one stays, for the terminal status."""
        self._entries.setdefault(job_uid, _Entry()).locked = True

    def drop(self, job_uid: str) -> None:
        """Forgets the report of a job whose terminal status is written, and keeps the job locked."""
        self._entries.setdefault(job_uid, _Entry(locked=True)).newest = None

    def is_locked(self, job_uid: str) -> bool:
        """True if a job accepts no more reports."""
        entry = self._entries.get(job_uid)
        return entry is not None and entry.locked

    def clear(self) -> None:
        """Removes everything about every job."""
        self._entries.clear()

    def forget(self, job_uid: str) -> None:
        """Removes everything about a job that is gone."""
        self._entries.pop(job_uid, None)
