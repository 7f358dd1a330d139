"""Requests about Kueue: whether it is there, its LocalQueues, the Workload that it makes of a Job, and its line.

Which versions of its API are served is asked of the API server, which lets every account know. The line is asked of
Kueue's visibility server, and only for information: whatever goes wrong there, the position is not known.
"""

import time
from typing import Final

from finetune_api.base import Json
from finetune_operator.cluster.requests import Connection, find, merge
from finetune_operator.errors import ApiError, ApiUnavailableError, NotFoundError

KUEUE_GROUP: Final = "kueue.x-k8s.io"
VISIBILITY_GROUP: Final = f"visibility.{KUEUE_GROUP}"
VERSIONS: Final = ("v1beta2", "v1beta1")
"""Versions whose objects are read, the better one first."""

LINE_SECONDS = 15.0
"""Time for which a queue's line is remembered: all jobs in it ask for the same one."""

NEW_SECONDS = 2.0
"""The same for a job that is not in the line that is remembered, as it is new."""

_FOUND_SECONDS, _MISSING_SECONDS = 300.0, 10.0


class Queues:
    """Kueue's objects. Methods raise ApiError or ApiUnavailableError, as those of `Cluster` do."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._versions: dict[str, tuple[float, str | None]] = {}  # by group: until when, and what was found
        self._lines: dict[tuple[str, str], tuple[float, dict[str, int]]] = {}

    async def are_served(self) -> bool:
        """True if Kueue's CustomResourceDefinitions are installed, in a version that is known here."""
        return await self._version(KUEUE_GROUP) is not None

    async def has_local_queue(self, namespace: str, name: str) -> bool:
        """True if a LocalQueue exists."""
        return await find(self._connection, f"{await self._path(namespace)}/localqueues/{name}") is not None

    async def list_workloads(self, namespace: str, job_uid: str) -> list[Json]:
        """Returns the Workloads that carry the UID of a batch/v1 Job."""
        query = {"labelSelector": f"{KUEUE_GROUP}/job-uid={job_uid}"}
        try:
            found = await self._connection.request("GET", f"{await self._path(namespace)}/workloads", query=query)
        except NotFoundError:
            return []
        return list(found.get("items") or ())

    async def patch_workload(self, workload: Json, changes: Json) -> Json:
        """Change a Workload; raises ConflictError if it changed since it was read."""
        metadata = workload["metadata"]
        path = f"{await self._path(metadata['namespace'])}/workloads/{metadata['name']}"
        return await merge(self._connection, path, metadata, changes)

    async def find_position(self, namespace: str, queue: str, workload: str) -> int | None:
        """Returns the place of a Workload among those that wait in its LocalQueue, from 1; None if it is not known."""
        key, now = (namespace, queue), time.monotonic()
        read, line = self._lines.get(key, (-LINE_SECONDS, {}))
        if now - read < (LINE_SECONDS if workload in line else NEW_SECONDS):
            return line.get(workload)

        line = await self._read_line(namespace, queue)
        self._lines = {other: entry for other, entry in self._lines.items() if now - entry[0] < LINE_SECONDS}
        self._lines[key] = (now, line)
        return line.get(workload)

    async def _read_line(self, namespace: str, queue: str) -> dict[str, int]:
        """Returns the place of each Workload by name; nothing where Kueue offers no visibility."""
        try:
            version = await self._version(VISIBILITY_GROUP)
            if version is None:
                return {}
            path = f"/apis/{VISIBILITY_GROUP}/{version}/namespaces/{namespace}/localqueues/{queue}/pendingworkloads"
            found = await self._connection.request("GET", path)
        except (ApiError, ApiUnavailableError):
            return {}
        return {item["metadata"]["name"]: item.get("positionInLocalQueue", 0) + 1 for item in found.get("items") or ()}

    async def _path(self, namespace: str) -> str:
        version = await self._version(KUEUE_GROUP) or VERSIONS[0]
        return f"/apis/{KUEUE_GROUP}/{version}/namespaces/{namespace}"

    async def _version(self, group: str) -> str | None:
        """Returns the best version of a group that is served; None if there is none."""
        until, known = self._versions.get(group, (0.0, None))
        if time.monotonic() < until:
            return known

        found = await find(self._connection, f"/apis/{group}") or {}
        served = {entry["version"] for entry in found.get("versions") or ()}
        best = next((version for version in VERSIONS if version in served), None)
        self._versions[group] = (time.monotonic() + (_FOUND_SECONDS if best else _MISSING_SECONDS), best)
        return best
