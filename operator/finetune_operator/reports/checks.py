"""Checks of a progress report, in this order:

413  the body is small enough
401  the API server vouches for the token: valid, for this job, bound to a pod that still exists
403  the pod belongs to the job: its owners lead to the job, all by UID
422  the body fits the schema
409  the pod is the job's newest, and the report is newer than the last one
410  neither the job nor the pod has ended
429  the job does not report too often
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from pydantic import ValidationError

from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_api.progress import MAX_BODY_BYTES, ProgressReport, token_audience
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cluster.cluster import NamespacedName, TokenIdentity
from finetune_operator.desired.names import controller_uid
from finetune_operator.errors import ReportRefusedError
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.observe import read_status
from finetune_operator.observe.report_store import ReceivedReport, ReportStore

_MAX_MESSAGE_CHARACTERS = 500


class ReportCluster(Protocol):
    """Requests to Kubernetes that the checks make."""

    async def get_fine_tune_job(self, name: NamespacedName) -> Json | None: ...
    async def get_job(self, namespace: str, name: str) -> Json | None: ...
    async def get_pod(self, namespace: str, name: str) -> Json | None: ...
    async def review_token(self, token: str, audience: str) -> TokenIdentity | None: ...


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
        self._cluster = cluster
        self._reports = reports
        self._now = now
        self._clock = clock

    async def check(self, name: NamespacedName, authorization: str, body: bytes) -> Accepted:
        """Make every check and store the report; raises ReportRefusedError, ApiError or ApiUnavailableError."""
        if len(body) > MAX_BODY_BYTES:
            raise ReportRefusedError(413, "TooLarge", f"a report has at most {MAX_BODY_BYTES} bytes")

        # A token's audience holds the job's UID, so no token can be reviewed without the job. The answer is the same
        # as for a wrong token: a stranger does not learn which jobs exist.
        token = _bearer_token(authorization)
        job = await self._cluster.get_fine_tune_job(name)
        metadata = ObjectMeta.model_validate(job["metadata"]) if job else None
        identity = await self._cluster.review_token(token, token_audience(metadata.uid)) if metadata else None
        if job is None or metadata is None or identity is None:
            raise ReportRefusedError(401, "Unauthorized", "the token is not valid for this job")

        pod = await self._owned_pod(name, metadata.uid, identity)
        report = _parse(body)

        status = read_status(job.get("status") or {})
        self._check_sequence(metadata.uid, status, pod, report.finetune.sequence)
        is_over = status.phase is not None and status.phase.is_terminal
        if is_over or pod.is_finished or self._reports.is_locked(metadata.uid):
            raise ReportRefusedError(410, "Ended", "the job or its pod has ended")
        # The rate comes last, so that refused reports do not use it up.
        if not self._reports.is_allowed(metadata.uid, self._clock()):
            raise ReportRefusedError(429, "TooManyReports", "report less often")

        received = ReceivedReport(pod.uid, self._now(), report)
        self._reports.put(metadata.uid, received)
        return Accepted(metadata.uid, received)

    async def _owned_pod(self, name: NamespacedName, job_uid: str, identity: TokenIdentity) -> TrainerPod:
        """Returns the pod that the token is bound to, if its owners lead to the job: pod -> Job -> FineTuneJob."""
        refusal = ReportRefusedError(403, "Forbidden", "the token's pod does not belong to this job")

        # The token names the pod and its UID, but not the pod's owners.
        if identity.namespace != name.namespace:
            raise refusal
        body = await self._cluster.get_pod(name.namespace, identity.pod_name)
        if body is None or body["metadata"]["uid"] != identity.pod_uid:
            raise refusal

        # UIDs are compared at each step: a Job that was deleted and created again has the same name.
        references = body["metadata"].get("ownerReferences") or ()
        owner = next((each["name"] for each in references if each.get("controller") and each["kind"] == "Job"), None)
        child = await self._cluster.get_job(name.namespace, owner) if owner else None
        if child is None or child["metadata"]["uid"] != controller_uid(body["metadata"]):
            raise refusal
        if controller_uid(child["metadata"]) != job_uid:
            raise refusal
        return TrainerPod.parse(body)

    def _check_sequence(self, job_uid: str, status: FineTuneJobStatus, pod: TrainerPod, sequence: int) -> None:
        """Refuse a report unless its number is higher than its pod's last one.

        After a restart of the operator, the last number is in the job's status.
        """
        pods = [attempt.uid for attempt in status.attempts]
        if pod.uid in pods[:-1]:
            raise ReportRefusedError(409, "OldPod", "a newer pod of this job has started")

        newest = self._reports.newest(job_uid)
        last: int | None = None
        if newest is not None and newest.pod_uid == pod.uid:
            last = newest.report.finetune.sequence
        elif pods and pods[-1] == pod.uid and status.progress is not None:
            last = status.progress.sequence

        if last is not None and sequence <= last:
            raise ReportRefusedError(409, "OldSequence", f"report {sequence} is not newer than report {last}")


def _bearer_token(authorization: str) -> str:
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
