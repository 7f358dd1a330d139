"""Handlers of kopf: watches become triggers, and nothing else. No other module of the operator registers any.

All of them are `on.event` handlers: they write nothing to objects and need no finalizer. A watch begins with a list,
whose objects come as events without a type: the controller then makes a list of its own and finds what has changed. A
lost event is harmless, as the controller finds its change within two minutes. kopf is told to retry for ever, because
giving up would end the process, and to post no Events of its own.
"""

import random
from collections.abc import Iterator
from typing import Any

import kopf

from finetune_api import GROUP, PLURAL, VERSION
from finetune_api.vocabulary import JOB_UID_LABEL, QUEUE_LABEL
from finetune_operator.cluster.cluster import NamespacedName
from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.cluster.queues import KUEUE_GROUP
from finetune_operator.desired.names import controller_uid, controlling_job_set
from finetune_operator.metrics.series import WATCH_EVENTS, WATCH_TIME
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.watch.controller import Controller

MAX_BACKOFF_SECONDS = 30.0


class EndlessBackoff:
    """Seconds between attempts of one request: doubling, jittered, without end. kopf starts a new iteration for each
    request."""

    def __iter__(self) -> Iterator[float]:
        delay = 0.5
        while True:
            yield delay * random.uniform(0.5, 1.0)  # noqa: S311 (jitter is no secret)
            delay = min(MAX_BACKOFF_SECONDS, delay * 2)


def build_settings() -> kopf.OperatorSettings:
    """Returns kopf's settings: endless retries, short timeouts, no feature that writes."""
    settings = kopf.OperatorSettings()

    settings.networking.error_backoffs = EndlessBackoff()  # after the last back-off, kopf would end the process
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10

    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.inactivity_timeout = 70  # bookmarks come every minute: a stream silent for longer is dead
    settings.watching.reconnect_backoff = 5  # between two lists: a proxy may break every watch at once
    settings.watching.chunk_size = 500  # objects a page
    settings.watching.label_selectors["batch", "v1", "jobs"] = JOB_UID_LABEL
    settings.watching.label_selectors["", "v1", "pods"] = JOB_UID_LABEL
    # kopf keeps a worker for each object until it was idle for this long. With few workers and kopf's 5 s, an event
    # after a restart would wait behind every object of the first list.
    settings.queueing.worker_limit = None  # handlers only fill our queue
    settings.queueing.idle_timeout = 0.1

    settings.posting.enabled = False
    settings.posting.loggers = False
    settings.scanning.disabled = True  # needs no rights on namespaces and CustomResourceDefinitions
    settings.peering.standalone = True
    settings.persistence.diffbase_storage = NothingCompared()
    return settings


class NothingCompared(kopf.DiffBaseStorage):
    """Keeps kopf from copying each object of each event to find what has changed in it: no handler asks."""

    def build(self, **_: Any) -> Any:
        """Return nothing of an object."""
        return {}

    def fetch(self, **_: Any) -> Any:
        """Return nothing to compare with."""
        return None

    def store(self, **_: Any) -> None:
        """Store nothing: the operator changes no annotation of a job."""


def build_registry(
    controller: Controller, terminated_pods: TerminatedPods, connection: ApiConnection, kueue: bool = False
) -> kopf.OperatorRegistry:
    """Returns the handlers, bound to the controller that they trigger. kopf logs in as `connection` does. `kueue`:
    whether Kueue's Workloads may be watched."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        # A session of kopf's own: kopf closes it and asks for another when the API server answers 401.
        return kopf.AiohttpSession(server=connection.api_url, aiohttp_session=connection.open_session())

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def fine_tune_job_changed(event: kopf.RawEvent, name: str, namespace: str | None, uid: str, **_: Any) -> None:
        _count("finetunejobs")
        if event["type"] is None:
            controller.trigger_list()
        elif event["type"] == "DELETED":
            controller.forget(uid)
        else:
            version = event["object"]["metadata"]["resourceVersion"]
            controller.trigger(NamespacedName(namespace or "", name), uid, version)

    @kopf.on.event("batch", "v1", "jobs", registry=registry)
    async def child_job_changed(event: kopf.RawEvent, labels: kopf.Labels, uid: str, **_: Any) -> None:
        _count("jobs")
        metadata: dict[str, Any] = {**event["object"]["metadata"]}
        in_set = controlling_job_set(metadata) is not None  # a queue holds the JobSet, which nothing watches
        if in_set or labels.get(QUEUE_LABEL):
            queued = str(controller_uid(metadata)) if in_set else uid
            controller.note_queued(queued, labels.get(JOB_UID_LABEL, ""), is_gone=event["type"] == "DELETED")
        _child_changed(controller, event, labels)

    @kopf.on.event("", "v1", "pods", registry=registry)
    async def pod_changed(event: kopf.RawEvent, body: kopf.Body, labels: kopf.Labels, **_: Any) -> None:
        _count("pods")
        terminated_pods.note(dict(body))  # a pod may be gone before the reconcile can read its exit code
        _child_changed(controller, event, labels)

    if kueue:
        _watch_workloads(registry, controller)
    return registry


def _watch_workloads(registry: kopf.OperatorRegistry, controller: Controller) -> None:
    @kopf.on.event(KUEUE_GROUP, "workloads", registry=registry)
    async def workload_changed(event: kopf.RawEvent, labels: kopf.Labels, **_: Any) -> None:
        _count("workloads")
        if event["type"] is not None:
            controller.trigger_queued(labels.get(f"{KUEUE_GROUP}/job-uid", ""))


def _child_changed(controller: Controller, event: kopf.RawEvent, labels: kopf.Labels) -> None:
    if event["type"] is None:
        controller.trigger_list()
    else:
        controller.trigger_owner(labels.get(JOB_UID_LABEL, ""))


def _count(stream: str) -> None:
    WATCH_EVENTS.labels(stream).inc()
    WATCH_TIME.labels(stream).set_to_current_time()
