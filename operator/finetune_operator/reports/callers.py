"""Finds out who sends a report: which pod of which job a token belongs to.

Asking the API server takes four requests, so answers are remembered by a hash of the token, and a peer may cause only
so many of them. A token that was refused is refused again for `REFUSED_SECONDS`; a token that was accepted is taken for
`VOUCHED_SECONDS` without another TokenReview. Its pod is read again every `POD_SECONDS`, which is as often as a status
shows a report; and the look at the job that shows it reads the pods anyway.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_api.progress import token_audience
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cluster.cluster import NamespacedName, TokenIdentity
from finetune_operator.desired.names import controller_uid, controlling_job_set
from finetune_operator.errors import ForbiddenError, ReportRefusedError
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.observe import read_status
from finetune_operator.reports.limits import Allowances, Remembered

REFUSED_SECONDS = 30.0
VOUCHED_SECONDS = 300.0
POD_SECONDS = 10.0  # 200 jobs that report each second would otherwise cost the API server 200 reads a second
LOOKUP_BURST = 100.0  # new tokens of one peer at once: many pods may share an address behind a gateway
LOOKUPS_PER_SECOND = 20.0


class JobSetReader(Protocol):
    """Requests about JobSets that the checks of a report make."""

    async def get(self, namespace: str, name: str) -> Json | None: ...


class ReportCluster(Protocol):
    """Requests to Kubernetes that the checks of a report make."""

    @property
    def job_sets(self) -> JobSetReader: ...

    async def get_fine_tune_job(self, name: NamespacedName) -> Json | None: ...
    async def get_job(self, namespace: str, name: str) -> Json | None: ...
    async def get_pod(self, namespace: str, name: str) -> Json | None: ...
    async def review_token(self, token: str, audience: str) -> TokenIdentity | None: ...


@dataclass(frozen=True)
class Caller:
    """The pod that a token belongs to, and its job, as the API server showed them."""

    job_uid: str
    pod_name: str
    pod_uid: str
    last_sequence: int | None
    """Number of the pod's last report in the job's status; it counts after a restart of the operator."""

    is_old: bool
    """True if a newer pod of the job has started."""

    is_over: bool
    """True if the job has ended."""


class Callers:
    """Looks tokens up, each as rarely as possible."""

    def __init__(self, cluster: ReportCluster, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._clock = clock
        self._vouched: Remembered[bytes, Caller] = Remembered(VOUCHED_SECONDS)
        self._pods: Remembered[bytes, TrainerPod] = Remembered(POD_SECONDS)
        self._refused: Remembered[bytes, ReportRefusedError] = Remembered(REFUSED_SECONDS)
        self._lookups: dict[bytes, asyncio.Task[Caller]] = {}
        self._allowances: Allowances[str] = Allowances(LOOKUP_BURST, LOOKUPS_PER_SECOND)

    async def find(self, name: NamespacedName, token: str, peer: str) -> Caller:
        """Returns the caller; raises ReportRefusedError (401, 403, 429), ApiError or ApiUnavailableError."""
        key = _key(name, token)
        if (refusal := self._refused.get(key, self._clock())) is not None:
            raise ReportRefusedError(refusal.status, refusal.reason, refusal.message)
        if (caller := self._vouched.get(key, self._clock())) is not None:
            return caller

        # The same token at the same time is looked up once.
        lookup = self._lookups.get(key)
        if lookup is None:
            if not self._allowances.take(peer, self._clock()):
                raise ReportRefusedError(429, "TooManyTokens", "this address sends too many new tokens: report later")
            lookup = self._lookups[key] = asyncio.create_task(self._look_up(key, name, token))
            lookup.add_done_callback(lambda done: self._finish(key, done))
        return await asyncio.shield(lookup)

    async def live_pod(self, name: NamespacedName, token: str, caller: Caller) -> TrainerPod:
        """Returns the caller's pod as it was at most `POD_SECONDS` ago; raises ReportRefusedError if it is gone."""
        key = _key(name, token)
        if (pod := self._pods.get(key, self._clock())) is not None:
            return pod

        body = await self._cluster.get_pod(name.namespace, caller.pod_name)
        if body is None or body["metadata"]["uid"] != caller.pod_uid:
            self.forget(name, token)
            raise _forbidden()
        pod = TrainerPod.parse(body)
        self._pods.put(key, pod, self._clock())
        return pod

    def forget(self, name: NamespacedName, token: str) -> None:
        """Look an accepted token up again with its next report."""
        key = _key(name, token)
        self._vouched.drop(key)
        self._pods.drop(key)

    def forget_all(self) -> None:
        """Look every accepted token up again with its next report."""
        self._vouched.clear()
        self._pods.clear()

    async def _look_up(self, key: bytes, name: NamespacedName, token: str) -> Caller:
        try:
            caller = await self._ask(name, token)
        except ReportRefusedError as refusal:
            self._refused.put(key, refusal, self._clock())
            raise
        self._vouched.put(key, caller, self._clock())
        return caller

    def _finish(self, key: bytes, lookup: asyncio.Task[Caller]) -> None:
        self._lookups.pop(key, None)
        if not lookup.cancelled():
            lookup.exception()  # taken notice of, though the connection that asked may be gone

    async def _ask(self, name: NamespacedName, token: str) -> Caller:
        # A token's audience holds the job's UID, so no token can be reviewed without the job. The answer is the same
        # as for a wrong token: a stranger does not learn which jobs exist.
        job = await self._cluster.get_fine_tune_job(name)
        metadata = ObjectMeta.model_validate(job["metadata"]) if job else None
        identity = await self._cluster.review_token(token, token_audience(metadata.uid)) if metadata else None
        if job is None or metadata is None or identity is None:
            raise ReportRefusedError(401, "Unauthorized", "the token is not valid for this job")

        await self._check_owners(name, metadata.uid, identity)
        return _caller(metadata.uid, identity, read_status(job.get("status") or {}))

    async def _check_owners(self, name: NamespacedName, job_uid: str, identity: TokenIdentity) -> None:
        """Refuse a token whose pod's owners do not lead to the job: pod -> Job -> FineTuneJob, or pod -> Job -> JobSet
        -> FineTuneJob."""
        # The token names the pod and its UID, but not the pod's owners.
        if identity.namespace != name.namespace:
            raise _forbidden()
        body = await self._cluster.get_pod(name.namespace, identity.pod_name)
        if body is None or body["metadata"]["uid"] != identity.pod_uid:
            raise _forbidden()

        # Of several nodes' pods, the first alone knows how the run goes.
        if TrainerPod.parse(body).index:
            raise _forbidden()

        # UIDs are compared at each step: a Job that was deleted and created again has the same name.
        references = body["metadata"].get("ownerReferences") or ()
        owner = next((each["name"] for each in references if each.get("controller") and each["kind"] == "Job"), None)
        child = await self._cluster.get_job(name.namespace, owner) if owner else None
        if child is None or child["metadata"]["uid"] != controller_uid(body["metadata"]):
            raise _forbidden()
        if controller_uid(child["metadata"]) != job_uid and not await self._is_in_job_set(name, job_uid, child):
            raise _forbidden()

    async def _is_in_job_set(self, name: NamespacedName, job_uid: str, child: Json) -> bool:
        """True if a JobSet of the FineTuneJob with this UID controls the Job."""
        job_set_name = controlling_job_set(child["metadata"])
        if job_set_name is None:
            return False

        # Who may not read JobSets has made none.
        try:
            job_set = await self._cluster.job_sets.get(name.namespace, job_set_name)
        except ForbiddenError:
            return False
        if job_set is None or job_set["metadata"]["uid"] != controller_uid(child["metadata"]):
            return False
        return controller_uid(job_set["metadata"]) == job_uid


def _caller(job_uid: str, identity: TokenIdentity, status: FineTuneJobStatus) -> Caller:
    pods = [attempt.uid for attempt in status.attempts]
    is_newest = bool(pods) and pods[-1] == identity.pod_uid
    return Caller(
        job_uid=job_uid,
        pod_name=identity.pod_name,
        pod_uid=identity.pod_uid,
        last_sequence=status.progress.sequence if is_newest and status.progress else None,
        is_old=identity.pod_uid in pods[:-1],
        is_over=status.phase is not None and status.phase.is_terminal,
    )


def _key(name: NamespacedName, token: str) -> bytes:
    """Hash of a job's name and a token, so that no token stays in memory."""
    return hashlib.sha256(f"{name} {token}".encode()).digest()


def _forbidden() -> ReportRefusedError:
    return ReportRefusedError(403, "Forbidden", "the token's pod does not belong to this job")
