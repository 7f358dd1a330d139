"""Requests of the operator to Kubernetes: the only module that knows paths and verbs.

The rights that these requests need are listed in `access.py`.

Children are created with POST and never applied, so that a name which is already taken raises ConflictError instead of
changing somebody else's object. The status is written with server-side apply under the UID and version that were
read: a job that was deleted and created again never gets its predecessor's status, and a write that arrives late never
replaces a newer one.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

from finetune_api import API_VERSION, GROUP, KIND, PLURAL, VERSION
from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_api.vocabulary import JOB_NAME_LABEL, JOB_UID_LABEL
from finetune_operator.cluster.gpu_users import GpuUsers
from finetune_operator.cluster.job_sets import JobSets
from finetune_operator.cluster.peer_objects import PeerObjects
from finetune_operator.cluster.queues import Queues
from finetune_operator.cluster.requests import find, merge
from finetune_operator.cluster.server_clock import ServerClock
from finetune_operator.cluster.status_writer import StatusWriter
from finetune_operator.desired.names import FIELD_MANAGER
from finetune_operator.errors import ApiUnavailableError, ForbiddenError, NotFoundError

METADATA_LIST: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
"""Accept header of a list without specs and statuses, which make up nearly all of a job's bytes."""

PAGE_SIZE = "500"
_OURS: Final = {"fieldManager": FIELD_MANAGER}  # names the operator in the managedFields of what it writes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class NamespacedName:
    """Namespace and name of a FineTuneJob."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Listed:
    """A FineTuneJob in a list: what has changed since the list before has other versions."""

    name: NamespacedName
    versions: frozenset[str]
    """`resourceVersion` of the job itself, of its Jobs and of their pods."""


@dataclass(frozen=True)
class TokenIdentity:
    """The pod that a token was issued to, according to the API server."""

    namespace: str
    pod_name: str
    pod_uid: str


class Connection(Protocol):
    """Requests to the API server, as `ApiConnection` sends them."""

    @property
    def clock(self) -> ServerClock: ...

    async def request(
        self,
        verb: str,
        path: str,
        body: Json | None = None,
        *,
        query: dict[str, str] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Json: ...


class Cluster:
    """The part of the cluster that the operator may see and change. Methods raise ApiError or ApiUnavailableError."""

    def __init__(self, connection: Connection, namespaces: Sequence[str] = ()) -> None:
        """`namespaces`: those that are served; none of them means all."""
        self._connection = connection
        self.queues = Queues(connection)
        self.gpu_users = GpuUsers(connection)
        self.peers = PeerObjects(connection)
        self.job_sets = JobSets(connection)
        self._statuses = StatusWriter(connection)
        self._namespaces = tuple(namespaces)

    def now(self) -> datetime:
        """Returns the API server's time, in whole seconds."""
        return self._connection.clock.now()

    async def wait_until_served(self) -> None:
        """Wait until the API server serves FineTuneJobs, which takes a moment after the CRD is installed."""
        while True:
            try:
                found = await self._connection.request("GET", f"/apis/{GROUP}/{VERSION}")
                if any(resource["name"] == PLURAL for resource in found["resources"]):
                    return
                logger.info("waiting for the CustomResourceDefinition %s.%s", PLURAL, GROUP)
            except (ApiUnavailableError, NotFoundError) as error:
                logger.info("waiting for the API server: %s", error)
            await asyncio.sleep(1)

    async def get_fine_tune_job(self, name: NamespacedName) -> Json | None:
        """Returns the job as it is now, or None if it does not exist."""
        return await find(self._connection, _resource_path(name))

    async def list_versions(self) -> dict[str, Listed]:
        """Returns every FineTuneJob that is served, by UID. Only metadata travels, a page at a time."""
        found = await self._list_metadata(f"/apis/{GROUP}/{VERSION}", PLURAL)
        names = {each["uid"]: NamespacedName(each["namespace"], each["name"]) for each in found}
        versions = {each["uid"]: {each["resourceVersion"]} for each in found}

        # A child that carries the label of no job is none of ours, or its job has gone meanwhile.
        for prefix, plural in (("/apis/batch/v1", "jobs"), ("/api/v1", "pods")):
            try:
                children = await self._list_metadata(prefix, plural, JOB_UID_LABEL)
            except ForbiddenError as error:
                # Without them, every job differs from the list before, and the look says what it lacks.
                logger.warning("cannot list children: %s", error)
                continue
            for child in children:
                owner = versions.get(child["labels"][JOB_UID_LABEL])
                if owner is not None:
                    owner.add(child["resourceVersion"])

        return {uid: Listed(name, frozenset(versions[uid])) for uid, name in names.items()}

    async def get_job(self, namespace: str, name: str) -> Json | None:
        """Returns a batch/v1 Job, or None if it does not exist."""
        return await find(self._connection, f"{_jobs_path(namespace)}/{name}")

    async def get_config_map(self, namespace: str, name: str) -> Json | None:
        """Returns a ConfigMap, or None if it does not exist."""
        return await find(self._connection, f"/api/v1/namespaces/{namespace}/configmaps/{name}")

    async def get_pod(self, namespace: str, name: str) -> Json | None:
        """Returns a pod, or None if it does not exist."""
        return await find(self._connection, f"/api/v1/namespaces/{namespace}/pods/{name}")

    async def list_pods(self, name: NamespacedName) -> list[Json]:
        """Returns the pods that are labelled with the name of a FineTuneJob, which may have had other UIDs before."""
        return await self._list_children(f"/api/v1/namespaces/{name.namespace}/pods", name)

    async def list_jobs(self, name: NamespacedName) -> list[Json]:
        """Returns the batch/v1 Jobs that are labelled with the name of a FineTuneJob."""
        return await self._list_children(_jobs_path(name.namespace), name)

    async def list_events(self, namespace: str, uid: str, reason: str) -> list[Json]:
        """Returns the Events with one reason about one object."""
        query = {"fieldSelector": f"involvedObject.uid={uid},reason={reason}"}
        found = await self._connection.request("GET", f"/api/v1/namespaces/{namespace}/events", query=query)
        return list(found.get("items") or ())

    async def create_job(self, job: Json) -> Json:
        """Create a child Job; raises ConflictError if the name is taken."""
        return await self._connection.request("POST", _jobs_path(job["metadata"]["namespace"]), job, query=_OURS)

    async def create_config_map(self, config_map: Json) -> Json:
        """Create a ConfigMap; raises ConflictError if the name is taken."""
        path = f"/api/v1/namespaces/{config_map['metadata']['namespace']}/configmaps"
        return await self._connection.request("POST", path, config_map, query=_OURS)

    async def patch_job(self, job: Json, changes: Json) -> Json:
        """Change fields of a child Job; raises ConflictError if it changed since `job` was read."""
        metadata = job["metadata"]
        return await merge(
            self._connection, f"{_jobs_path(metadata['namespace'])}/{metadata['name']}", metadata, changes
        )

    async def evict_pod(self, namespace: str, name: str, uid: str) -> None:
        """Stop a pod as a drained node would, so that its Job does not count it; raises ConflictError if its name is
        another pod's by now."""
        kind = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": namespace}}
        body = kind | {"deleteOptions": {"preconditions": {"uid": uid}}}
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/eviction"
        await self._connection.request("POST", path, body, query=_OURS)

    async def apply_status(self, job: ObjectMeta, status: Json) -> str:
        """Write the whole status of a FineTuneJob with server-side apply; returns the job's new version.

        `job` is its metadata as it was read. Raises ConflictError if it has changed since, NotFoundError if it was
        deleted.
        """
        seen = {"uid": job.uid, "resourceVersion": job.resource_version}
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": job.name, "namespace": job.namespace} | seen,
            "status": status,
        }

        applied = await self._statuses.apply(f"{_resource_path(NamespacedName(job.namespace, job.name))}/status", body)
        return str(applied["metadata"]["resourceVersion"])

    async def create_event(self, event: Json) -> None:
        """Post an Event."""
        path = f"/api/v1/namespaces/{event['metadata']['namespace']}/events"
        await self._connection.request("POST", path, event, query=_OURS)

    async def review_token(self, token: str, audience: str) -> TokenIdentity | None:
        """Returns the pod of a token, or None unless the token is valid now, for this audience and bound to a pod."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        answer = await self._connection.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body)

        # An API server that does not check audiences leaves them out of its answer.
        status: Json = answer.get("status") or {}
        if not status.get("authenticated") or audience not in (status.get("audiences") or ()):
            return None
        return _identity(status.get("user") or {})

    async def get_lease(self, namespace: str, name: str) -> Json | None:
        """Returns the Lease of the operator's leader, or None if it does not exist."""
        return await find(self._connection, f"{_leases_path(namespace)}/{name}")

    async def create_lease(self, lease: Json) -> Json:
        """Create the Lease; raises ConflictError if another replica did so first."""
        return await self._connection.request("POST", _leases_path(lease["metadata"]["namespace"]), lease, query=_OURS)

    async def replace_lease(self, lease: Json) -> Json:
        """Replace the Lease; raises ConflictError if it changed since the version in `lease` was read."""
        metadata = lease["metadata"]
        path = f"{_leases_path(metadata['namespace'])}/{metadata['name']}"
        return await self._connection.request("PUT", path, lease, query=_OURS)

    async def _list_children(self, path: str, name: NamespacedName) -> list[Json]:
        found = await self._connection.request("GET", path, query={"labelSelector": f"{JOB_NAME_LABEL}={name.name}"})
        return list(found.get("items") or ())

    async def _list_metadata(self, prefix: str, plural: str, label: str = "") -> list[Json]:
        """Returns the metadata of the objects of one kind that carry a label."""
        scopes = [f"/namespaces/{namespace}" for namespace in self._namespaces] or [""]
        paths = [f"{prefix}{scope}/{plural}" for scope in scopes]
        return [metadata for path in paths for metadata in await self._list_pages(path, label)]

    async def _list_pages(self, path: str, label: str) -> list[Json]:
        query = {"limit": PAGE_SIZE} | ({"labelSelector": label} if label else {})
        found: list[Json] = []

        while True:
            page = await self._connection.request("GET", path, query=query, accept=METADATA_LIST)
            found += [item["metadata"] for item in page.get("items") or ()]

            token = page["metadata"].get("continue")
            if not token:
                return found
            query |= {"continue": token}


def _resource_path(name: NamespacedName) -> str:
    return f"/apis/{GROUP}/{VERSION}/namespaces/{name.namespace}/{PLURAL}/{name.name}"


def _jobs_path(namespace: str) -> str:
    return f"/apis/batch/v1/namespaces/{namespace}/jobs"


def _leases_path(namespace: str) -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"


def _identity(user: dict[str, Any]) -> TokenIdentity | None:
    """Returns the pod of a service account's token, from the user that TokenReview names."""
    parts = str(user.get("username", "")).split(":")
    extra = user.get("extra") or {}
    names = list(extra.get("authentication.kubernetes.io/pod-name") or [])
    uids = list(extra.get("authentication.kubernetes.io/pod-uid") or [])

    # A service account's user name is system:serviceaccount:NAMESPACE:NAME.
    if len(parts) != 4 or parts[:2] != ["system", "serviceaccount"] or len(names) != 1 or len(uids) != 1:
        return None
    return TokenIdentity(namespace=parts[2], pod_name=names[0], pod_uid=uids[0])
