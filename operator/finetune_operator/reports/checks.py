"""Who may report progress, and what: every check of the progress server, in the order in which they are made.

413 size, 401 token, 403 ownership, 422 schema, 409 sequence, 410 job or pod has ended, 429 rate. The API server
vouches for the token (valid, for this job, bound to a pod that still exists); the pod's owners must lead to the job,
all by UID.
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
    """What the checks ask of Kubernetes."""

    async def get_fine_tune_job(self, key: NamespacedName) -> Json | None: ...
    async def get_job(self, namespace: str, name: str) -> Json | None: ...
    async def get_pod(self, namespace: str, name: str) -> Json | None: ...
    async def review_token(self, token: str, audience: str) -> TokenIdentity | None: ...


@dataclass(frozen=True)
class Accepted:
    """A report that passed, and the UID of its job."""

    job_uid: str
    received: ReceivedReport


class ReportChecks:
    """Checks reports against the cluster and against what was reported before."""

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

    async def check(self, key: NamespacedName, authorization: str, body: bytes) -> Accepted:
        """Make every check and keep the report; raises ReportRefusedError, ApiError or ApiUnavailableError."""
        if len(body) > MAX_BODY_BYTES:
            raise ReportRefusedError(413, "TooLarge", f"a report has at most {MAX_BODY_BYTES} bytes")
        token = _bearer_token(authorization)
        job = await self._cluster.get_fine_tune_job(key)
        # Without the job there is no audience to review the token for; whoever asks is told no more than that.
        metadata = ObjectMeta.model_validate(job["metadata"]) if job else None
        identity = await self._cluster.review_token(token, token_audience(metadata.uid)) if metadata else None
        if job is None or metadata is None or identity is None:
            raise ReportRefusedError(401, "Unauthorized", "the token is not valid for this job")
        pod = await self._owned_pod(key, metadata.uid, identity)
        report = _parse(body)
        status = read_status(job.get("status") or {})
        self._check_sequence(metadata.uid, status, pod, report.finetune.sequence)
        is_over = status.phase is not None and status.phase.is_terminal
        if is_over or pod.is_finished or self._reports.is_locked(metadata.uid):
            raise ReportRefusedError(410, "Ended", "the job or its pod has ended")
        if not self._reports.is_allowed(metadata.uid, self._clock()):
            raise ReportRefusedError(429, "TooManyReports", "report less often")
        received = ReceivedReport(pod.uid, self._now(), report)
        self._reports.put(metadata.uid, received)
        return Accepted(metadata.uid, received)

    async def _owned_pod(self, key: NamespacedName, job_uid: str, identity: TokenIdentity) -> TrainerPod:
        """The pod that the token is bound to, if it belongs to the job: pod -> Job -> FineTuneJob."""
        refusal = ReportRefusedError(403, "Forbidden", "the token's pod does not belong to this job")
        if identity.namespace != key.namespace:
            raise refusal
        body = await self._cluster.get_pod(key.namespace, identity.pod_name)
        if body is None or body["metadata"]["uid"] != identity.pod_uid:
            raise refusal
        references = body["metadata"].get("ownerReferences") or ()
        name = next((each["name"] for each in references if each.get("controller") and each["kind"] == "Job"), None)
        child = await self._cluster.get_job(key.namespace, name) if name else None
        if child is None or child["metadata"]["uid"] != controller_uid(body["metadata"]):
            raise refusal
        if controller_uid(child["metadata"]) != job_uid:
            raise refusal
        return TrainerPod.parse(body)

    def _check_sequence(self, job_uid: str, status: FineTuneJobStatus, pod: TrainerPod, sequence: int) -> None:
        """Numbers rise within a pod. After a restart of the operator, the status still knows the last one."""
        pods = [attempt.uid for attempt in status.attempts]
        if pod.uid in pods[:-1]:
            raise ReportRefusedError(409, "OldPod", "a newer pod of this job reports")
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
