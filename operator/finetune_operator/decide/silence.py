"""Silence of a trainer that has reported before: for how long, and whether its own end is the likely cause (pure).

A trainer that lives reports at least every minute, whatever it does (`StallLimit.heartbeat_seconds`). Silence therefore
means that its process is frozen, that its node hangs, or that reports do not reach the operator. The last must end no
training, so time counts only while the operator leads and reaches its own progress server, and a pod is left alone if
the trainer that was heard last of all others fell silent at the same time.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.failures import FailureReason
from finetune_api.pod_ends.stalls import StallLimit
from finetune_api.status import Attempt
from finetune_operator.desired.names import TRAINER
from finetune_operator.desired.run_config_map import has_heartbeat
from finetune_operator.observe.snapshot import ChildRun, Snapshot

SAME_TIME = 3
"""Trainers that fall silent within so many heartbeats do so for one cause, which is none of theirs."""


@dataclass(frozen=True)
class Silence:
    """A trainer that runs, and when it was heard last."""

    last_report: datetime
    since: datetime
    """Begin of the time that counts: the last report, or when the operator began to listen."""

    limit: StallLimit
    is_shared: bool
    """True if other trainers fell silent with it."""

    def seconds_until(self, limit: timedelta, now: datetime) -> float:
        """Returns the seconds until the silence takes so long; 0 or less if it does."""
        return (self.since + limit - now).total_seconds()


def find_silence(snapshot: Snapshot, run: ChildRun) -> Silence | None:
    """Returns the time without a report of the newest pod; None if it need not report, or never has."""
    pod, policy = run.newest_pod, snapshot.spec.run_policy
    listening = snapshot.channel.listening_since
    if run.component != TRAINER or pod is None or not pod.is_running or policy.suspend or listening is None:
        return None
    if snapshot.config_map is None or not has_heartbeat(snapshot.config_map):
        return None  # the trainer of an older version is silent while nothing changes

    heard = _last_heard(snapshot, run)
    if heard is None:
        return None

    limit, others = StallLimit.of(policy.stall_timeout_seconds), snapshot.channel.others_heard
    same_time = timedelta(seconds=SAME_TIME * limit.heartbeat_seconds)
    is_shared = others is not None and abs(others - heard) <= same_time
    return Silence(heard, max(heard, listening), limit, is_shared)


def find_attempt(snapshot: Snapshot, uid: str) -> Attempt | None:
    """Returns a pod as the status knows it."""
    return next((each for each in snapshot.status.attempts if each.uid == uid), None)


def is_given_up(snapshot: Snapshot, uid: str) -> bool:
    """True if the status says that the operator ends a pod for its silence."""
    attempt = find_attempt(snapshot, uid)
    return attempt is not None and attempt.reason == FailureReason.STALLED


def _last_heard(snapshot: Snapshot, run: ChildRun) -> datetime | None:
    uid, heard = run.newest_pod.uid if run.newest_pod else "", snapshot.channel.heard
    if heard is not None and heard.pod_uid == uid:
        return heard.time

    # After a restart of the operator, only the status knows. Sequence numbers are those of the newest pod.
    progress, attempts = snapshot.status.progress, snapshot.status.attempts
    is_known = bool(attempts) and attempts[-1].uid == uid
    return progress.last_report_time if progress and is_known and progress.sequence is not None else None
