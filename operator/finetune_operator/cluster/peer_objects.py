"""Requests about what a job on several nodes needs beside its Job: a Service and a NetworkPolicy."""

from typing import Protocol

from finetune_api.base import Json
from finetune_operator.cluster.requests import find
from finetune_operator.desired.names import FIELD_MANAGER


class Connection(Protocol):
    """Requests to the API server, as `ApiConnection` sends them."""

    async def request(
        self, verb: str, path: str, body: Json | None = None, *, query: dict[str, str] | None = None
    ) -> Json: ...


class PeerObjects:
    """Services and NetworkPolicies. Methods raise ApiError or ApiUnavailableError; ConflictError if a name is taken."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get_service(self, namespace: str, name: str) -> Json | None:
        """Returns a Service, or None if it does not exist."""
        return await find(self._connection, f"{_services(namespace)}/{name}")

    async def get_network_policy(self, namespace: str, name: str) -> Json | None:
        """Returns a NetworkPolicy, or None if it does not exist."""
        return await find(self._connection, f"{_policies(namespace)}/{name}")

    async def create_service(self, service: Json) -> None:
        """Creates a Service."""
        await self._post(_services(service["metadata"]["namespace"]), service)

    async def create_network_policy(self, policy: Json) -> None:
        """Creates a NetworkPolicy."""
        await self._post(_policies(policy["metadata"]["namespace"]), policy)

    async def _post(self, path: str, body: Json) -> None:
        await self._connection.request("POST", path, body, query={"fieldManager": FIELD_MANAGER})


def _services(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/services"


def _policies(namespace: str) -> str:
    return f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies"
