"""Schedules reconciles: tracks known jobs, rate-limits them and hands them to workers.

A reconcile looks at one job and its children, and does what is due. Events only say that a job should be looked at, so
many of them may become one reconcile. Events can be lost, because a watch can die silently, so every job is also looked
at every `RESYNC_SECONDS`. Progress reports arrive every few seconds, but each status write costs the API server a write
to etcd, so a job's reports share one write per `REPORT_SECONDS`.

The queue decides when a job is due; `WORKERS` tasks take jobs from it. A heartbeat travels through the same queue, so
its age shows whether the workers still take anything.
"""

import asyncio
import logging
import random
import time
from enum import Enum, auto

from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.errors import ApiError, ApiUnavailableError, ConflictError, ForbiddenError
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.reconcile import Reconciler
from finetune_operator.watch.work_queue import WorkQueue

WORKERS = 8
RESYNC_SECONDS = 120.0
LIST_RETRY_SECONDS = 5.0
SPREAD_SECONDS_PER_JOB = 0.01
"""Part of a resync that each job gets, so that 1,000 jobs are spread over 10 s instead of arriving at once."""

HEARTBEAT_SECONDS = 5.0
REPORT_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Heartbeat(Enum):
    """The key in the queue that names no job: a worker that takes it proves that work is still done."""

    BEAT = auto()


class Controller:
    """Owns the queue. kopf's handlers and the progress server call `trigger*`, in the same event loop."""

    def __init__(self, cluster: Cluster, reconciler: Reconciler, reports: ReportStore) -> None:
        self._cluster = cluster
        self._reconciler = reconciler
        self._reports = reports
        self._queue: WorkQueue[NamespacedName | Heartbeat] = WorkQueue()
        self._names: dict[str, NamespacedName] = {}  # by UID
        self._last_reported: dict[str, tuple[float, str]] = {}  # by UID: time of the write, stage
        self._heartbeat = time.monotonic()
        self.refusal = ""
        """Why FineTuneJobs can be neither read nor written, in the API server's words; empty while they can."""

        self.has_listed = False
        """Whether every existing job has been seen since the start."""

    def trigger(self, name: NamespacedName, job_uid: str) -> None:
        """Look at a FineTuneJob that changed."""
        self._names[job_uid] = name
        self._queue.add(name)

    def trigger_owner(self, job_uid: str) -> None:
        """Look at the FineTuneJob with this UID, because a child of it changed.

        A job that is not known yet is skipped: its own event follows and makes it known.
        """
        name = self._names.get(job_uid)
        if name is not None:
            self._queue.add(name)

    def trigger_report(self, job_uid: str, name: NamespacedName, stage: str) -> None:
        """Have a progress report written: at once for a new stage, else with later reports of the same job."""
        written, last_stage = self._last_reported.get(job_uid, (0.0, ""))
        now = time.monotonic()

        delay = 0.0 if stage != last_stage else max(0.0, written + REPORT_SECONDS - now)
        self._last_reported[job_uid] = (now + delay, stage)
        self._queue.add(name, delay)

    def forget(self, job_uid: str) -> None:
        """Drop everything that is remembered of a FineTuneJob that is gone."""
        self._names.pop(job_uid, None)
        self._last_reported.pop(job_uid, None)
        self._reports.forget(job_uid)

    def heartbeat_age(self) -> float:
        """Seconds since a worker last took the heartbeat from the queue."""
        return time.monotonic() - self._heartbeat

    async def run(self) -> None:
        """Work until cancelled. May run again later: then another replica has worked meanwhile."""
        self._last_reported.clear()
        self._heartbeat = time.monotonic()
        self.refusal, self.has_listed = "", False

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
                    await self._reconcile(name)
            finally:
                self._queue.done(name)

    async def _reconcile(self, name: NamespacedName) -> None:
        """Reconcile one job and queue its next turn. No error ends a worker."""
        try:
            again = await self._reconciler.reconcile(name)
        except ConflictError as error:
            delay = self._queue.add_after_failure(name)
            logger.info("%s: an object changed since it was read, trying again in %.1f s: %s", name, delay, error)
        except ForbiddenError as error:  # of the FineTuneJob itself; a refusal of a child stands in its status
            self.refusal = str(error)
            delay = self._queue.add_after_failure(name, LIST_RETRY_SECONDS)
            logger.warning("%s: reconcile failed, trying again in %.1f s: %s", name, delay, error)
        except (ApiError, ApiUnavailableError) as error:
            wanted = error.retry_after if isinstance(error, ApiUnavailableError) else 0.0
            delay = self._queue.add_after_failure(name, wanted)
            logger.warning("%s: reconcile failed, trying again in %.1f s: %s", name, delay, error)
        except Exception:
            delay = self._queue.add_after_failure(name)
            logger.exception("%s: defect in the operator, trying again in %.1f s", name, delay)
        else:
            self.refusal = ""
            self._queue.succeeded(name)
            if again is not None:
                self._queue.add(name, again)

    async def _resync(self) -> None:
        """List all jobs now and then, forget those that are gone and look at the others."""
        while True:
            try:
                found = await self._cluster.list_fine_tune_jobs()
            except (ApiError, ApiUnavailableError) as error:
                self.refusal = str(error) if isinstance(error, ForbiddenError) else self.refusal
                logger.warning("cannot list FineTuneJobs, trying again in %.0f s: %s", LIST_RETRY_SECONDS, error)
                await asyncio.sleep(LIST_RETRY_SECONDS)
                continue

            self.refusal = ""
            for uid in self._names.keys() - {uid for _, uid in found}:
                self.forget(uid)

            # The first list is worked through at once: nobody knows how long the operator was away.
            spread = min(RESYNC_SECONDS / 2, len(found) * SPREAD_SECONDS_PER_JOB) if self.has_listed else 0.0
            for name, uid in found:
                self._names[uid] = name
                self._queue.add(name, random.uniform(0, spread))  # noqa: S311 (jitter is no secret)

            self.has_listed = True
            await asyncio.sleep(RESYNC_SECONDS)
