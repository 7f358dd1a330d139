"""Requests about JobSets, of clusters whose JobSet controller makes the Jobs of a job on several nodes."""

from typing import Protocol

from finetune_api.base import Json
from finetune_operator.desired.job_set import API_VERSION
from finetune_operator.errors import NotFoundError


class Connection(Protocol):
    """Requests to the API server, as `ApiConnection` sends them."""

    async def request(self, verb: str, path: str) -> Json: ...


class JobSets:
    """JobSets. Methods raise ApiError or ApiUnavailableError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, namespace: str, name: str) -> Json | None:
        """Returns a JobSet, or None if it does not exist, or if the cluster serves none."""
        try:
            return await self._connection.request("GET", f"/apis/{API_VERSION}/namespaces/{namespace}/jobsets/{name}")
        except NotFoundError:
            return None
