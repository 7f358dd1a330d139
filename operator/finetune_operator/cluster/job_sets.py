"""Requests about JobSets, of clusters whose JobSet controller makes the Jobs of a job on several nodes.

Whether they are served is asked of the API server, which lets every account know.
"""

from finetune_api.base import Json
from finetune_operator.cluster.requests import Connection, find, merge
from finetune_operator.desired.job_set import API_VERSION
from finetune_operator.desired.names import FIELD_MANAGER

_OURS = {"fieldManager": FIELD_MANAGER}


class JobSets:
    """JobSets. Methods raise ApiError or ApiUnavailableError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def are_served(self) -> bool:
        """True if the CustomResourceDefinition of JobSets is installed, in the version that is written here."""
        return await find(self._connection, f"/apis/{API_VERSION}") is not None

    async def get(self, namespace: str, name: str) -> Json | None:
        """Returns a JobSet, or None if it does not exist, or if the cluster serves none."""
        return await find(self._connection, f"{_path(namespace)}/{name}")

    async def create(self, job_set: Json) -> None:
        """Creates a JobSet; raises ConflictError if the name is taken."""
        await self._connection.request("POST", _path(job_set["metadata"]["namespace"]), job_set, query=_OURS)

    async def patch(self, job_set: Json, changes: Json) -> None:
        """Changes fields of a JobSet; raises ConflictError if it changed since it was read."""
        metadata = job_set["metadata"]
        await merge(self._connection, f"{_path(metadata['namespace'])}/{metadata['name']}", metadata, changes)


def _path(namespace: str) -> str:
    return f"/apis/{API_VERSION}/namespaces/{namespace}/jobsets"
