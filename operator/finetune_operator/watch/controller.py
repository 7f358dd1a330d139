"""Schedules reconciles: tracks known jobs, rate-limits them and hands them to workers.

A reconcile looks at one job and its children, and does what is due. Events only say that a job should be looked at, so
many of them may become one reconcile. Events can be lost, because a watch can die silently. So every
`RESYNC_SECONDS`, the versions of all jobs and their children are listed, a few requests in all. A job of which anything
has changed since the list before is looked at soon, at the latest before the next list; of a job that is over or waits,
nothing changes, and it costs nothing.

The queue decides when a job is due; `WORKERS` tasks take jobs from it: those with events first, those of lists and
timers in the background. A heartbeat travels through the same queue, so its age shows whether the workers still take
anything.
"""

import asyncio
import logging
import random
import time
from contextlib import suppress
from enum import Enum, auto

from finetune_api.logs.formats import log_context
from finetune_operator.cluster.cluster import Cluster, Listed, NamespacedName
from finetune_operator.errors import ApiError, ApiUnavailableError, ConflictError, ForbiddenError
from finetune_operator.gpu_line import GpuLine
from finetune_operator.metrics.series import LISTS, RECONCILE_ERRORS, RECONCILE_SECONDS, RELISTED_CHANGES
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.reconcile import Reconciler
from finetune_operator.watch.work_queue import Lane, WorkQueue

WORKERS = 32
RESYNC_SECONDS = 60.0
SECONDS_PER_LOOK = 0.06  # between looks at what a list shows to have changed
LIST_AGAIN_SECONDS = 5.0
"""Time until the next list after one that failed, or after a watch has begun anew."""

HEARTBEAT_SECONDS = 5.0
GATHER_SECONDS = 0.2
"""Time from a child's first change to the look: a Job that is made and given a pod changes four times in it."""

logger = logging.getLogger(__name__)


class Heartbeat(Enum):
    """The key in the queue that names no job: a worker that takes it proves that work is still done."""

    BEAT = auto()


class Controller:
    """Owns the queue. kopf's handlers and the progress server call `trigger*`, in the same event loop."""

    def __init__(self, cluster: Cluster, reconciler: Reconciler, reports: ReportStore, line: GpuLine) -> None:
        self._cluster = cluster
        self._reconciler = reconciler
        self._reports = reports
        self._line = line
        self._queue: WorkQueue[NamespacedName | Heartbeat] = WorkQueue()
        self._changed: set[NamespacedName] = set()  # jobs to be looked at for more than their reports
        self._names: dict[str, NamespacedName] = {}  # by UID
        self._versions: dict[str, frozenset[str]] = {}  # by UID: of the job and its children, in the newest list
        self._events_meanwhile: dict[NamespacedName, tuple[str, str]] = {}  # of jobs that a worker has: UID, version
        self._queued: dict[str, str] = {}  # UIDs of FineTuneJobs by those of their batch/v1 Jobs in queues
        self._is_list_due = asyncio.Event()
        self._heartbeat = time.monotonic()
        self.refusal = ""
        """Why FineTuneJobs can be neither read nor written, in the API server's words; empty while they can."""

        self.has_listed = False
        """Whether every existing job has been seen since the start."""

    def trigger(self, name: NamespacedName, job_uid: str, version: str) -> None:
        """Look at a FineTuneJob that changed, unless the change is our own write of its status."""
        self._names[job_uid] = name
        if self._queue.is_active(name):
            self._events_meanwhile[name] = (job_uid, version)  # the write's event may be here before its answer
        elif not self._reconciler.wrote(job_uid, version):
            self._add(name)

    def trigger_list(self) -> None:
        """Compare all jobs soon, because a watch has begun with a list: changes may have been missed before."""
        self._is_list_due.set()

    def trigger_owner(self, job_uid: str) -> None:
        """Look at the FineTuneJob with this UID, because a child of it changed.

        A job that is not known yet is skipped: its own event follows and makes it known. So is one that needs nothing
        more: the Job controller changes the children of a finished job several times.
        """
        name = self._names.get(job_uid)
        if name is not None and not self._reconciler.is_settled(job_uid):
            self._add(name, GATHER_SECONDS)

    def note_queued(self, child_uid: str, job_uid: str, *, is_gone: bool) -> None:
        """Remember whose batch/v1 Job is in a queue: Kueue's Workloads name that Job only."""
        if is_gone:
            self._queued.pop(child_uid, None)
        else:
            self._queued[child_uid] = job_uid

    def trigger_queued(self, child_uid: str) -> None:
        """Look at the FineTuneJob of a batch/v1 Job in a queue, because its Workload changed."""
        self.trigger_owner(self._queued.get(child_uid, ""))

    def trigger_report(self, job_uid: str, name: NamespacedName) -> None:
        """Look at a job when its newest progress report is to be written."""
        delay = self._reports.seconds_until_shown(job_uid)
        if delay is not None:
            self._queue.add(name, delay)

    def forget(self, job_uid: str) -> None:
        """Drop everything that is remembered of a FineTuneJob that is gone."""
        self._names.pop(job_uid, None)
        self._versions.pop(job_uid, None)
        self._reports.forget(job_uid)
        self._reconciler.forget(job_uid)
        self._wake_line()

    def queue_depth(self) -> int:
        """Returns the number of jobs that are to be looked at, now or later."""
        return len(self._queue)

    def heartbeat_age(self) -> float:
        """Seconds since a worker last took the heartbeat from the queue."""
        return time.monotonic() - self._heartbeat

    def _add(self, name: NamespacedName, delay: float = 0.0, lane: Lane = Lane.URGENT) -> None:
        """Have a job looked at of which something has changed."""
        self._changed.add(name)
        self._queue.add(name, delay, lane)

    def _add_after_failure(self, name: NamespacedName, at_least: float = 0.0) -> float:
        self._changed.add(name)
        return self._queue.add_after_failure(name, at_least)

    def start_over(self) -> None:
        """Have every job looked at again, because another replica has worked meanwhile."""
        self._versions.clear()
        self._events_meanwhile.clear()
        self.has_listed = False

    async def run(self) -> None:
        """Work until cancelled. May run again later: events are kept meanwhile, and so is what was broken off."""
        self._heartbeat = time.monotonic()
        self.refusal = ""

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._resync(), name="resync")
            for number in range(WORKERS):
                tasks.create_task(self._work(), name=f"reconcile-{number}")
            self._queue.add(Heartbeat.BEAT)

    async def _work(self) -> None:
        while True:
            name = await self._queue.get()
            try:
                if isinstance(name, Heartbeat):
                    self._heartbeat = time.monotonic()
                    self._queue.add(name, HEARTBEAT_SECONDS)
                else:
                    with log_context(namespace=name.namespace, job=name.name):
                        await self._reconcile(name)
            except asyncio.CancelledError:
                if not isinstance(name, Heartbeat):
                    self._add(name)  # for the next run
                raise
            finally:
                self._queue.done(name)
                if not isinstance(name, Heartbeat) and (event := self._events_meanwhile.pop(name, None)):
                    self.trigger(name, *event)

    async def _reconcile(self, name: NamespacedName) -> None:
        """Reconcile one job and queue its next turn. No error ends a worker."""
        has_changed = name in self._changed
        self._changed.discard(name)

        try:
            with RECONCILE_SECONDS.time():
                again = await self._reconciler.reconcile(name, has_changed=has_changed)
        except ConflictError as error:
            RECONCILE_ERRORS.labels("Conflict").inc()
            delay = self._add_after_failure(name)
            logger.info("%s: an object changed since it was read, trying again in %.1f s: %s", name, delay, error)
        except ForbiddenError as error:  # of the FineTuneJob itself; a refusal of a child stands in its status
            self.refusal = str(error)
            RECONCILE_ERRORS.labels("Forbidden").inc()
            delay = self._add_after_failure(name, LIST_AGAIN_SECONDS)
            logger.warning("%s: reconcile failed, trying again in %.1f s: %s", name, delay, error)
        except (ApiError, ApiUnavailableError) as error:
            RECONCILE_ERRORS.labels("Refused" if isinstance(error, ApiError) else "Unavailable").inc()
            wanted = error.retry_after if isinstance(error, ApiUnavailableError) else 0.0
            delay = self._add_after_failure(name, wanted)
            logger.warning("%s: reconcile failed, trying again in %.1f s: %s", name, delay, error)
        except Exception:
            RECONCILE_ERRORS.labels("Defect").inc()
            delay = self._add_after_failure(name)
            logger.exception("%s: defect in the operator, trying again in %.1f s", name, delay)
        else:
            self.refusal = ""
            self._queue.succeeded(name)
            self._wake_line()
            if again is not None:
                self._queue.add(name, again, Lane.BACKGROUND if again else Lane.URGENT)

    def _wake_line(self) -> None:
        for name, delay in self._line.take_woken().items():
            self._add(name, delay)

    async def _resync(self) -> None:
        """List all jobs now and then, forget those that are gone and look at those that have changed."""
        while True:
            self._is_list_due.clear()
            known = set(self._names)
            try:
                listed = await self._cluster.list_versions()
            except (ApiError, ApiUnavailableError) as error:
                self.refusal = str(error) if isinstance(error, ForbiddenError) else self.refusal
                LISTS.labels("failed").inc()
                logger.warning("cannot list FineTuneJobs, trying again in %.0f s: %s", LIST_AGAIN_SECONDS, error)
                await asyncio.sleep(LIST_AGAIN_SECONDS)
                continue

            LISTS.labels("done").inc()
            self.refusal = ""
            for uid in known - listed.keys():
                self.forget(uid)
            self._compare(listed)
            self.has_listed = True

            with suppress(TimeoutError):
                async with asyncio.timeout(RESYNC_SECONDS):
                    await self._is_list_due.wait()
                await asyncio.sleep(LIST_AGAIN_SECONDS)  # a watch lists its objects one by one

    def _compare(self, listed: dict[str, Listed]) -> None:
        """Have every job looked at that has changed since the list before; all jobs after the first list."""
        changed = [(uid, job) for uid, job in listed.items() if self._versions.get(uid) != job.versions]
        self._names |= {uid: job.name for uid, job in listed.items()}

        # The first list is worked through at once: nobody knows how long the operator was away. Later, a thousand jobs
        # are spread over the time until the next list, and a few, whose events were lost, do not wait for long.
        spread = min(RESYNC_SECONDS, len(changed) * SECONDS_PER_LOOK) if self.has_listed else 0.0

        for uid, job in changed:
            self._versions[uid] = job.versions
            RELISTED_CHANGES.inc()
            self._add(job.name, random.uniform(0, spread), Lane.BACKGROUND)  # noqa: S311 (jitter is no secret)
