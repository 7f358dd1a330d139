"""Turns triggers into reconciles: which jobs exist, when each is looked at, and by whom.

Triggers may be lost (a watch can die silently), so every job is also looked at after each `RESYNC_SECONDS`.
"""

import asyncio
import logging
import random
import time

from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.errors import ApiError, ApiUnavailableError, ConflictError
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.reconcile import Reconciler
from finetune_operator.watch.work_queue import WorkQueue

WORKERS = 8
RESYNC_SECONDS = 120.0
HEARTBEAT_SECONDS = 5.0
REPORT_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Controller:
    """Owns the queue. `trigger*` are called from kopf's handlers and the progress server, in the same event loop."""

    def __init__(self, cluster: Cluster, reconciler: Reconciler, reports: ReportStore) -> None:
        self._cluster = cluster
        self._reconciler = reconciler
        self._reports = reports
        self._queue: WorkQueue[NamespacedName | None] = WorkQueue()  # None is the heartbeat
        self._keys: dict[str, NamespacedName] = {}
        self._last_reported: dict[str, tuple[float, str]] = {}
        self._heartbeat = time.monotonic()
        self.has_listed = False
        """Whether every existing job has been seen since the start."""

    def trigger(self, key: NamespacedName, job_uid: str) -> None:
        """A FineTuneJob changed."""
        self._keys[job_uid] = key
        self._queue.add(key)

    def trigger_owner(self, job_uid: str) -> None:
        """A child of the FineTuneJob with this UID changed. One that is not known yet is found by its own trigger."""
        key = self._keys.get(job_uid)
        if key is not None:
            self._queue.add(key)

    def trigger_report(self, job_uid: str, key: NamespacedName, stage: str) -> None:
        """A progress report arrived: it is written at once if the stage is new, else with others in a while."""
        written, last_stage = self._last_reported.get(job_uid, (0.0, ""))
        now = time.monotonic()
        delay = 0.0 if stage != last_stage else max(0.0, written + REPORT_SECONDS - now)
        self._last_reported[job_uid] = (now + delay, stage)
        self._queue.add(key, delay)

    def forget(self, job_uid: str) -> None:
        """A FineTuneJob is gone."""
        self._keys.pop(job_uid, None)
        self._last_reported.pop(job_uid, None)
        self._reports.forget(job_uid)

    def heartbeat_age(self) -> float:
        """Seconds since a worker last took the heartbeat through the queue."""
        return time.monotonic() - self._heartbeat

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._resync(), name="resync")
            for number in range(WORKERS):
                tasks.create_task(self._work(), name=f"reconcile-{number}")
            self._queue.add(None)

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            try:
                if key is None:
                    self._heartbeat = time.monotonic()
                    self._queue.add(None, HEARTBEAT_SECONDS)
                else:
                    await self._reconcile(key)
            finally:
                self._queue.done(key)

    async def _reconcile(self, key: NamespacedName) -> None:
        try:
            again = await self._reconciler.reconcile(key)
        except ConflictError as error:
            delay = self._queue.add_after_failure(key)
            logger.info("%s: changed meanwhile, again in %.1f s: %s", key, delay, error)
        except (ApiError, ApiUnavailableError) as error:
            delay = self._queue.add_after_failure(key)
            logger.warning("%s: again in %.1f s: %s", key, delay, error)
        except Exception:
            delay = self._queue.add_after_failure(key)
            logger.exception("%s: defect in the reconcile, again in %.1f s", key, delay)
        else:
            self._queue.succeeded(key)
            if again is not None:
                self._queue.add(key, again)

    async def _resync(self) -> None:
        while True:
            try:
                found = await self._cluster.list_fine_tune_jobs()
            except (ApiError, ApiUnavailableError) as error:
                logger.warning("cannot list jobs: %s", error)
                await asyncio.sleep(5)
                continue
            for uid in self._keys.keys() - {uid for _, uid in found}:
                self.forget(uid)
            spread = min(RESYNC_SECONDS / 2, len(found) * 0.01) if self.has_listed else 0.0
            for key, uid in found:
                self._keys[uid] = key
                self._queue.add(key, random.uniform(0, spread))  # noqa: S311 (jitter is no secret)
            self.has_listed = True
            await asyncio.sleep(RESYNC_SECONDS)
