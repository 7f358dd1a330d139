"""An informer: the newest version of every object of a namespace, as watches show them.

Lives wait for changes here. If each of thirty asked the API server ten times a second instead, that would cost more
than everything that is tested.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.watch.watch import iter_resp_lines
from urllib3.exceptions import HTTPError

from finetune_api.base import Json
from finetune_devcluster.cluster import DevCluster

T = TypeVar("T")
KINDS: Final = ("finetunejobs", "jobs", "pods", "configmaps")
Listener = Callable[[str, Json], None]
"""Is told each event's type and object, in the order of the watch."""


class Informer:
    """Follows the objects of one namespace in threads of its own."""

    def __init__(self, cluster: DevCluster, namespace: str) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._objects: dict[str, dict[str, Json]] = {kind: {} for kind in KINDS}
        self._listeners: dict[str, Listener] = {}
        self._changed = threading.Condition()
        self._is_stopped = False

    def start(self, listeners: dict[str, Listener]) -> None:
        """Follow every kind, until `stop`. `listeners`: by kind, who is told of each event."""
        self._listeners = listeners
        for kind in KINDS:
            threading.Thread(target=self._follow, args=(kind,), daemon=True).start()

    def stop(self) -> None:
        """Follow no further; the watches end with the API server."""
        self._is_stopped = True

    def get(self, kind: str, name: str) -> Json | None:
        """Returns an object, or None if it does not exist."""
        return self._objects[kind].get(name)

    def find(self, kind: str, labels: dict[str, str]) -> list[Json]:
        """Returns the objects with these labels, oldest first."""
        with self._changed:
            found = [each for each in self._objects[kind].values() if labels.items() <= _labels(each).items()]
        return sorted(found, key=lambda each: (each["metadata"]["creationTimestamp"], each["metadata"]["name"]))

    def wait_for(self, get: Callable[[], T | None], what: str, seconds: float) -> T:
        """Returns what `get` does as soon as that is true, asked after each change; raises TimeoutError."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not (found := get()):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{what}: not within {seconds:g} s")
                self._changed.wait(left)
        return found

    def wait_for_quiet(self, kind: str, name: str, seconds: float) -> None:
        """Wait until an object has not changed for so long."""
        version, since = self._version(kind, name), time.monotonic()
        with self._changed:
            while (left := since + seconds - time.monotonic()) > 0:
                self._changed.wait(left)
                now = self._version(kind, name)
                if now != version:
                    version, since = now, time.monotonic()

    def _version(self, kind: str, name: str) -> str:
        found = self.get(kind, name)
        return str(found["metadata"]["resourceVersion"]) if found else ""

    def _follow(self, kind: str) -> None:
        # A watch without a version begins with every object that exists.
        while not self._is_stopped:
            with self._changed:
                self._objects[kind].clear()
            with suppress(HTTPError, ApiException):
                for line in iter_resp_lines(self._watch(kind)):  # type: ignore[no-untyped-call]
                    event = json.loads(line) if line else {}
                    if event.get("type") in ("ADDED", "MODIFIED", "DELETED"):
                        self._take(kind, event["type"], event["object"])
            time.sleep(0.5)

    def _watch(self, kind: str) -> Any:
        api = self._cluster.api_client()
        options: Any = {"watch": True, "_preload_content": False}
        if kind == "finetunejobs":
            custom: Any = client.CustomObjectsApi(api)
            return custom.list_namespaced_custom_object("finetune.dev", "v1alpha1", self._namespace, kind, **options)
        if kind == "jobs":
            batch: Any = client.BatchV1Api(api)
            return batch.list_namespaced_job(self._namespace, **options)
        core: Any = client.CoreV1Api(api)
        listing = core.list_namespaced_pod if kind == "pods" else core.list_namespaced_config_map
        return listing(self._namespace, **options)

    def _take(self, kind: str, event: str, found: Json) -> None:
        name = found["metadata"]["name"]
        with self._changed:
            if event == "DELETED":
                self._objects[kind].pop(name, None)
            else:
                self._objects[kind][name] = found
            if kind in self._listeners:
                self._listeners[kind](event, found)
            self._changed.notify_all()


def _labels(found: Json) -> dict[str, str]:
    return found["metadata"].get("labels") or {}
