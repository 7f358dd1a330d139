"""Requests about the GPUs of a namespace: its jobs, and the trainers' Jobs that hold them."""

from typing import Protocol

from finetune_api import GROUP, PLURAL, VERSION
from finetune_api.base import Json
from finetune_api.vocabulary import COMPONENT_LABEL
from finetune_operator.desired.names import FIELD_MANAGER, TRAINER


class Connection(Protocol):
    """Requests to the API server."""

    async def request(self, verb: str, path: str, *, query: dict[str, str] | None = None) -> Json: ...


class GpuUsers:
    """Whoever holds GPUs of a namespace, or wants to. Methods raise ApiError or ApiUnavailableError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def list_fine_tune_jobs(self, namespace: str) -> list[Json]:
        """Returns the FineTuneJobs of a namespace."""
        found = await self._connection.request("GET", f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}")
        return list(found.get("items") or ())

    async def list_trainer_jobs(self, namespace: str) -> list[Json]:
        """Returns the batch/v1 Jobs of a namespace that train."""
        query = {"labelSelector": f"app.kubernetes.io/managed-by={FIELD_MANAGER},{COMPONENT_LABEL}={TRAINER}"}
        found = await self._connection.request("GET", f"/apis/batch/v1/namespaces/{namespace}/jobs", query=query)
        return list(found.get("items") or ())
