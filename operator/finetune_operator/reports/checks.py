"""Checks of a progress report, in this order:

413  the body is small enough
429  the peer does not send too many new tokens
401  the API server vouches for the token: valid, for this job, bound to a pod that still exists
403  the pod belongs to the job: its owners lead to the job, all by UID; and it exists now
429  the job does not report too often
422  the body fits the schema
409  the pod is the job's newest, and the report is newer than the last one
410  neither the job nor the pod has ended

A token that was looked up before costs one request to the API server in ten seconds: its pod is read, so that no
report is accepted for longer from a pod that has ended. A token that was refused costs none, and neither does a job
that reports too often.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from finetune_api.progress import MAX_BODY_BYTES, ProgressReport
from finetune_operator.cluster.cluster import NamespacedName
from finetune_operator.errors import ReportRefusedError
from finetune_operator.observe.report_store import ReceivedReport, ReportStore
from finetune_operator.reports.callers import Caller, Callers, ReportCluster
from finetune_operator.reports.limits import Allowances

BURST = 20.0  # reports of one job; a small job passes through all of its stages within a second
PER_SECOND = 1.0  # reports of one job in the long run
_MAX_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True)
class Sender:
    """Names that a request gives of itself: where it came from, the job it is for, and its Authorization header."""

    peer: str
    name: NamespacedName
    authorization: str


@dataclass(frozen=True)
class Accepted:
    """A report that passed every check, with the UID of its job."""

    job_uid: str
    received: ReceivedReport


class ReportChecks:
    """Checks reports against the cluster and against earlier reports."""

    def __init__(
        self,
        cluster: ReportCluster,
        reports: ReportStore,
        now: Callable[[], datetime],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._callers = Callers(cluster, clock)
        self._reports = reports
        self._now = now
        self._clock = clock
        self._allowances: Allowances[str] = Allowances(BURST, PER_SECOND)

    def start_over(self) -> None:
        """Forget every report and every accepted token: another replica has led, and has accepted reports."""
        self._reports.clear()
        self._callers.forget_all()
        self.listen_anew()

    def listen_anew(self) -> None:
        """Count the silence of trainers from now on, because no report may have arrived before."""
        self._reports.listen(self._now())

    async def check(self, sender: Sender, body: bytes) -> Accepted:
        """Make every check and store the report; raises ReportRefusedError, ApiError or ApiUnavailableError."""
        if len(body) > MAX_BODY_BYTES:
            raise ReportRefusedError(413, "TooLarge", f"a report has at most {MAX_BODY_BYTES} bytes")

        token = bearer_token(sender.authorization)
        caller = await self._find_caller(sender, token)
        self._reports.hear(caller.job_uid, caller.pod_uid, self._now())  # refused or not, its trainer lives
        if not self._allowances.take(caller.job_uid, self._clock()):
            raise ReportRefusedError(429, "TooManyReports", "report less often")

        pod = await self._callers.live_pod(sender.name, token, caller)
        report = _parse(body)
        self._check_sequence(caller, report.finetune.sequence)
        if caller.is_over or pod.is_finished or self._reports.is_locked(caller.job_uid):
            raise ReportRefusedError(410, "Ended", "the job or its pod has ended")

        received = ReceivedReport(pod.uid, self._now(), report)
        self._reports.put(caller.job_uid, received)
        return Accepted(caller.job_uid, received)

    async def _find_caller(self, sender: Sender, token: str) -> Caller:
        caller = await self._callers.find(sender.name, token, sender.peer)

        # Another pod of the job has reported since: what was remembered does not say which is the newer one.
        newest = self._reports.newest(caller.job_uid)
        if newest is not None and newest.pod_uid != caller.pod_uid:
            self._callers.forget(sender.name, token)
            return await self._callers.find(sender.name, token, sender.peer)
        return caller

    def _check_sequence(self, caller: Caller, sequence: int) -> None:
        """Refuse a report unless its number is higher than its pod's last one.

        After a restart of the operator, the last number is in the job's status.
        """
        if caller.is_old:
            raise ReportRefusedError(409, "OldPod", "a newer pod of this job has started")

        newest = self._reports.newest(caller.job_uid)
        is_known = newest is not None and newest.pod_uid == caller.pod_uid
        last = newest.report.finetune.sequence if newest and is_known else caller.last_sequence
        if last is not None and sequence <= last:
            raise ReportRefusedError(409, "OldSequence", f"report {sequence} is not newer than report {last}")


def bearer_token(authorization: str) -> str:
    """Returns the token of an Authorization header; raises ReportRefusedError (401) if there is none."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise ReportRefusedError(401, "Unauthorized", "a bearer token is required")
    return token.strip()


def _parse(body: bytes) -> ProgressReport:
    try:
        return ProgressReport.model_validate_json(body)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ReportRefusedError(422, "InvalidReport", found[:_MAX_MESSAGE_CHARACTERS]) from None
