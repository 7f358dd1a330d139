"""The main path: observe, decide, act, answer. Level-triggered: it starts from whatever is there.

A crash between any two writes is harmless: children have deterministic names, what the Job controller would forget is
recorded in the same patch that makes it forget, and the status is derived again.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from finetune_api.status import FineTuneJobStatus
from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.decide.decide import decide
from finetune_operator.decide.decision import Actions, Decision, Installation
from finetune_operator.errors import ApiError, ConflictError, ForbiddenError, NotFoundError
from finetune_operator.observe.observe import newest_report, observe
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.reasons import Reason
from finetune_operator.status.events import build_event, find_transitions
from finetune_operator.status.status import build_status, has_changed

REFUSED_RETRY_SECONDS = 30.0

logger = logging.getLogger(__name__)


def utc_now() -> datetime:
    """The time, in whole seconds as Kubernetes writes it."""
    return datetime.now(UTC).replace(microsecond=0)


class Reconciler:
    """Brings one job after the other to where its spec wants it."""

    def __init__(
        self,
        cluster: Cluster,
        installation: Installation,
        reports: ReportStore,
        terminated_pods: TerminatedPods,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._cluster = cluster
        self._installation = installation
        self._reports = reports
        self._terminated_pods = terminated_pods
        self._clock = clock

    async def reconcile(self, key: NamespacedName) -> float | None:
        """Look at one job and do what is due. Returns after how many seconds to look again (None: when something
        happens). Raises ApiError or ApiUnavailableError; the caller then tries again."""
        snapshot = await observe(self._cluster, key, self._terminated_pods, self._reports, self._clock())
        if snapshot is None:
            return None
        decision = decide(snapshot, self._installation)
        try:
            await self._act(key, snapshot, decision.actions)
        except (ConflictError, NotFoundError):
            raise  # the view was old, or the namespace is going: look again
        except ApiError as error:
            decision = _refused(decision, error)
        await self._answer(key, snapshot, decision)
        return decision.requeue_seconds

    async def _act(self, key: NamespacedName, snapshot: Snapshot, actions: Actions) -> None:
        if actions.create_config_map is not None:
            await self._cluster.create_config_map(actions.create_config_map)
        if actions.update_config_map is not None and snapshot.config_map is not None:
            await self._cluster.patch_config_map(snapshot.config_map, actions.update_config_map)
        if actions.create_job is not None:
            await self._cluster.create_job(actions.create_job)
            logger.info("%s: Job %s created", key, actions.create_job["metadata"]["name"])
        for job, changes in ((snapshot.preflight, actions.patch_preflight), (snapshot.child, actions.patch_job)):
            if job is not None and changes is not None:
                await self._cluster.patch_job(job.body, changes)
                logger.info("%s: Job %s changed: %s", key, job.name, changes.get("spec"))

    async def _answer(self, key: NamespacedName, snapshot: Snapshot, decision: Decision) -> None:
        """Tell the turning points, and write the status, if it says something new."""
        if decision.phase.is_terminal:
            uid = snapshot.metadata.uid
            self._reports.lock(uid)  # whatever was accepted until now is part of the terminal status
            snapshot = replace(snapshot, report=newest_report(self._reports, uid, snapshot.pods))
        status = build_status(snapshot, decision)
        if not has_changed(snapshot.status, status):
            return
        await self._tell(snapshot, status)
        try:
            await self._cluster.apply_status(key, snapshot.metadata.uid, status.to_wire())
        except NotFoundError:
            return  # deleted meanwhile
        if decision.phase.is_terminal:
            self._reports.drop(snapshot.metadata.uid)
        if status.phase is not snapshot.status.phase:
            logger.info("%s: %s (%s)", key, status.phase, decision.reason)

    async def _tell(self, snapshot: Snapshot, status: FineTuneJobStatus) -> None:
        for transition in find_transitions(snapshot.status, status):
            event = build_event(snapshot.metadata, transition, snapshot.now)
            try:
                await self._cluster.create_event(event)
            except ConflictError:
                logger.debug("event %s was posted before", event["metadata"]["name"])
            except (ForbiddenError, NotFoundError) as error:  # the namespace is going
                logger.warning("event %s not posted: %s", transition.reason, error)


def _refused(decision: Decision, error: ApiError) -> Decision:
    """A write to a child that was refused: by the operator's role, a quota, an admission policy, or as invalid.
    Somebody has to do something about it; it is tried again now and then."""
    reason = Reason.PERMISSION_DENIED if isinstance(error, ForbiddenError) else Reason.CHILD_REJECTED
    message = f"{error.request} was refused: {error.message}"
    return Decision(decision.phase, reason, message, is_stalled=True, requeue_seconds=REFUSED_RETRY_SECONDS)
