"""The main path of a job: observe, decide, act, write the status. Level-triggered: it starts from whatever is there.

A crash between any two writes does no harm. Children have deterministic names; what the Job controller would forget is
recorded in the same patch that makes it forget; and the status is derived again. A write that arrives late does no harm
either: every change names the version of the object that it was decided from.
"""

import asyncio
import json
import logging
from collections import OrderedDict, defaultdict
from dataclasses import replace

from finetune_api.job import ObjectMeta
from finetune_api.logs.formats import log_context
from finetune_api.status import MAX_STATUS_BYTES, FineTuneJobStatus
from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.decide.decide import decide
from finetune_operator.decide.decision import Actions, Decision
from finetune_operator.decide.waiting.gpu_limit import find_gpu_wait
from finetune_operator.desired.installation import Installation
from finetune_operator.errors import ApiError, ConflictError, ForbiddenError, NotFoundError
from finetune_operator.gpu_line import GpuLine
from finetune_operator.metrics.job_ends import count_write
from finetune_operator.metrics.job_gauges import JOBS, JobFacts
from finetune_operator.observe.gpu_use import read_gpu_use
from finetune_operator.observe.observe import observe, observe_reports, of_newest_pod
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.snapshot import AnySnapshot, Snapshot
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.observe.termination import parse_time
from finetune_operator.status.events import build_event, find_transitions
from finetune_operator.status.status import build_status, has_changed, reduce_status
from finetune_operator.status_reasons import StatusReason

REFUSED_RETRY_SECONDS = 30.0
MAX_REPORTING = 500  # jobs that are remembered as they were seen; others are read again for each report that is shown
UNPROCESSABLE, TOO_LARGE = 422, 413  # HTTP statuses of an object that is invalid, or too large to be stored

logger = logging.getLogger(__name__)


class Reconciler:
    """Brings jobs, one at a time, to the state that their specs ask for."""

    def __init__(
        self,
        cluster: Cluster,
        installation: Installation,
        reports: ReportStore,
        terminated_pods: TerminatedPods,
        line: GpuLine,
    ) -> None:
        self._cluster = cluster
        self._installation = installation
        self._reports = reports
        self._terminated_pods = terminated_pods
        self._starts: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by namespace
        self._line = line
        self._written: dict[str, str] = {}  # by UID: the job's version after the newest write of its status
        self._settled: set[str] = set()  # UIDs
        self._reporting: OrderedDict[NamespacedName, Snapshot] = OrderedDict()  # as last seen, the newest last

    def wrote(self, job_uid: str, version: str) -> bool:
        """True if nothing has changed a job since its status was written: its event tells nothing new."""
        return self._written.get(job_uid) == version

    def is_settled(self, job_uid: str) -> bool:
        """True if a job needed nothing more when it was last looked at, whatever becomes of its children."""
        return job_uid in self._settled

    def forget(self, job_uid: str) -> None:
        """Drop what is remembered of a job that is gone."""
        self._written.pop(job_uid, None)
        self._settled.discard(job_uid)
        self._line.forget(job_uid)
        JOBS.forget(job_uid)

    async def reconcile(self, key: NamespacedName, *, has_changed: bool = True) -> float | None:
        """Looks at one job and does what is due. `has_changed`: False if nothing is known to be new but the job's
        progress reports. Returns the seconds after which to look again; None to wait for the next change. Raises
        ApiError or ApiUnavailableError; the caller then tries again, as of a job that has changed."""
        seen = self._reporting.pop(key, None)
        if seen is not None and not has_changed:
            snapshot = observe_reports(seen, self._reports, self._cluster.now())
            decision = decide(snapshot, self._installation)
            if decision.goes_on:
                await self._write_status(key, snapshot, decision)
                return self._wait(snapshot, decision)

        return await self._look(key)

    async def _look(self, key: NamespacedName) -> float | None:
        snapshot = await observe(self._cluster, key, self._terminated_pods, self._reports, self._installation)
        if snapshot is None:
            return None

        with log_context(job_uid=snapshot.metadata.uid):
            self._note_settled(snapshot)
            decision = decide(snapshot, self._installation)
            try:
                await self._start_or_act(key, snapshot, decision.actions)
            except (ConflictError, NotFoundError):
                raise  # the snapshot was outdated, or the namespace is being deleted: look again
            except ApiError as error:
                decision = explain_refusal(decision, error)

            await self._write_status(key, snapshot, decision)
            if self._installation.max_gpus_per_namespace is not None:
                self._line.note(key, snapshot, decision)
        return self._wait(snapshot, decision)

    def _wait(self, snapshot: AnySnapshot, decision: Decision) -> float | None:
        waits = (decision.requeue_seconds, self._reports.seconds_until_shown(snapshot.metadata.uid))
        return min((seconds for seconds in waits if seconds is not None), default=None)

    async def _start_or_act(self, key: NamespacedName, snapshot: AnySnapshot, actions: Actions) -> None:
        """Acts. Where a namespace has a limit, one job after the other takes its GPUs: of two that were looked at in
        the same moment, the second sees the first."""
        if not isinstance(snapshot, Snapshot) or snapshot.gpu_use is None or not actions.starts_training:
            return await self._act(key, snapshot, actions)

        async with self._starts[key.namespace]:
            use = await read_gpu_use(self._cluster, snapshot, snapshot.spec, self._installation)
            if find_gpu_wait(replace(snapshot, gpu_use=use), snapshot.training) is not None:
                raise ConflictError(409, f"GET finetunejobs {key}", "another job has taken the namespace's GPUs")
            return await self._act(key, snapshot, actions)

    async def _act(self, key: NamespacedName, snapshot: AnySnapshot, actions: Actions) -> None:
        if actions.creates:
            await self._check_unchanged(key, snapshot.metadata)

        await self._create_what_pods_need(actions)
        for manifest in (actions.create_preflight_job, actions.create_trainer_job):
            if manifest is not None:
                await self._cluster.create_job(manifest)
                logger.info("%s: created Job %s", key, manifest["metadata"]["name"])

        if actions.create_job_set is not None:
            await self._cluster.job_sets.create(actions.create_job_set)
            logger.info("%s: created JobSet %s", key, actions.create_job_set["metadata"]["name"])

        patches = (
            (snapshot.preflight.job, actions.patch_preflight_job),
            (snapshot.training.job, actions.patch_trainer_job),
        )
        for job, changes in patches:
            if job is not None and changes is not None:
                await self._cluster.patch_job(job.body, changes)
                logger.info("%s: changed Job %s: %s", key, job.name, changes.get("spec"))

        # Its Job comes first: what it has run is noted before it is suspended.
        job_set = snapshot.training.job_set
        if job_set is not None and actions.patch_job_set is not None:
            await self._cluster.job_sets.patch(job_set.body, actions.patch_job_set)
            logger.info("%s: changed JobSet %s: %s", key, job_set.name, actions.patch_job_set["spec"])

        if actions.patch_workload is not None:
            workload, changes = actions.patch_workload.workload, actions.patch_workload.changes
            await self._cluster.queues.patch_workload(workload, changes)
            logger.info("%s: changed Workload %s: %s", key, workload["metadata"]["name"], changes["spec"])

        if actions.evict_pod is not None:
            await self._cluster.evict_pod(key.namespace, actions.evict_pod.pod_name, actions.evict_pod.pod_uid)
            logger.info("%s: evicted pod %s", key, actions.evict_pod.pod_name)

    async def _create_what_pods_need(self, actions: Actions) -> None:
        """Creates what comes before the Jobs: their pods mount the ConfigMap, find each other by the Service, and are
        kept apart from others by the NetworkPolicy."""
        if actions.create_config_map is not None:
            await self._cluster.create_config_map(actions.create_config_map)
        if actions.create_service is not None:
            await self._cluster.peers.create_service(actions.create_service)
        if actions.create_network_policy is not None:
            await self._cluster.peers.create_network_policy(actions.create_network_policy)

    async def _check_unchanged(self, key: NamespacedName, read: ObjectMeta) -> None:
        """Reads a job once more; raises ConflictError if it has changed, or is gone.

        Every other write names the version that it was decided from; a creation cannot. A job may be deleted while its
        children are read: they are missing then, and would be made again for a job that nobody has any more.
        """
        found = await self._cluster.get_fine_tune_job(key)
        if found is None or found["metadata"].get("resourceVersion") != read.resource_version:
            raise ConflictError(
                409, f"GET finetunejobs {key}", "it was changed or deleted while its children were read"
            )

    async def _write_status(self, key: NamespacedName, snapshot: AnySnapshot, decision: Decision) -> None:
        """Posts an Event for each transition and writes the status, if it says something new."""
        uid = snapshot.metadata.uid
        if decision.phase.is_terminal:
            # Reports are accepted until this moment, and the newest is part of the terminal status.
            self._reports.lock(uid)
            report = of_newest_pod(self._reports.newest(uid), snapshot.training.pods)
            snapshot = replace(snapshot, training=replace(snapshot.training, report=report))

        status = build_status(snapshot, decision)
        JOBS.note(uid, _facts(snapshot, decision, status))
        if not has_changed(snapshot.status, status):
            self._remember(key, snapshot, decision)
            return

        await self._post_events(snapshot, status)
        try:
            version = await self._apply(key, snapshot, decision, status)
        except NotFoundError:
            return  # the job was deleted meanwhile
        if version is not None:
            metadata = snapshot.metadata.model_copy(update={"resource_version": version})
            self._remember(key, replace(snapshot, metadata=metadata, status=status), decision)

        count_write(snapshot.status, status, snapshot.now.timestamp() - _created(snapshot))
        if decision.phase.is_terminal:
            self._reports.drop(uid)
        if status.phase is not snapshot.status.phase:
            logger.info("%s: %s (%s)", key, status.phase, decision.reason)

    def _note_settled(self, snapshot: AnySnapshot) -> None:
        if isinstance(snapshot, Snapshot) and snapshot.is_settled:
            self._settled.add(snapshot.metadata.uid)
        else:
            self._settled.discard(snapshot.metadata.uid)

    def _remember(self, key: NamespacedName, snapshot: AnySnapshot, decision: Decision) -> None:
        """Keeps what was seen of a job that reports, so that the next report costs one request: the write."""
        if isinstance(snapshot, Snapshot) and snapshot.training.report is not None and decision.goes_on:
            self._reporting[key] = snapshot
            if len(self._reporting) > MAX_REPORTING:
                self._reporting.popitem(last=False)

    async def _apply(
        self, key: NamespacedName, snapshot: AnySnapshot, decision: Decision, status: FineTuneJobStatus
    ) -> str | None:
        """Writes a status and returns the job's new version; if it cannot be stored, writes what the operator knows
        itself and returns None."""
        wire = status.to_wire()
        size = len(json.dumps(wire, ensure_ascii=False).encode())
        try:
            if size <= MAX_STATUS_BYTES:
                version = await self._cluster.apply_status(snapshot.metadata, wire)
                self._written[snapshot.metadata.uid] = version
                return version
            refusal = f"it has {size} bytes, more than {MAX_STATUS_BYTES}"
        except ApiError as error:
            if error.status not in (UNPROCESSABLE, TOO_LARGE):
                raise
            refusal = error.message

        logger.error("%s: the status cannot be stored: %s", key, refusal)
        if snapshot.status.phase is not None and snapshot.status.phase.is_terminal:
            return None  # what is stored is the job's end
        reduced = reduce_status(snapshot, decision, refusal)
        if has_changed(snapshot.status, reduced):
            await self._cluster.apply_status(snapshot.metadata, reduced.to_wire())
        return None

    async def _post_events(self, snapshot: AnySnapshot, status: FineTuneJobStatus) -> None:
        for transition in find_transitions(snapshot.status, status):
            event = build_event(snapshot.metadata, transition, snapshot.now)
            try:
                await self._cluster.create_event(event)
            except ConflictError:
                logger.debug("event %s was posted before", event["metadata"]["name"])
            except (ForbiddenError, NotFoundError) as error:  # the namespace is being deleted
                logger.warning("event %s was not posted: %s", transition.reason, error)


def explain_refusal(decision: Decision, error: ApiError) -> Decision:
    """Decides after the API server refused a write to a child: by the operator's role, a quota or an admission policy,
    or as invalid. A person has to act; the write is tried again every `REFUSED_RETRY_SECONDS`."""
    reason = StatusReason.PERMISSION_DENIED if isinstance(error, ForbiddenError) else StatusReason.CHILD_REJECTED
    message = f"the API server refused {error.request}: {error.message}"
    return Decision(decision.phase, reason, message, is_stalled=True, requeue_seconds=REFUSED_RETRY_SECONDS)


def _facts(snapshot: AnySnapshot, decision: Decision, status: FineTuneJobStatus) -> JobFacts:
    """Returns what the metrics count of a job."""
    phase = status.phase or decision.phase
    spec = snapshot.spec if isinstance(snapshot, Snapshot) else None
    return JobFacts(
        phase=phase,
        needs_person=decision.reason if decision.is_stalled and not phase.is_terminal else "",
        created=_created(snapshot),
        gpus=spec.resources.all_gpus if spec else 0,
        tokens_per_second=(status.progress.tokens_per_second if status.progress else None) or 0.0,
    )


def _created(snapshot: AnySnapshot) -> float:
    """Returns the Unix time of a job's creation, by the API server's clock."""
    return (parse_time(snapshot.metadata.creation_timestamp) or snapshot.now).timestamp()
