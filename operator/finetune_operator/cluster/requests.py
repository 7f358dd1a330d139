"""Requests that several kinds of objects need: reading what may not be there, and changing what was read."""

from typing import Protocol

from finetune_api.base import Json
from finetune_operator.cluster.connection import MERGE_PATCH
from finetune_operator.desired.names import FIELD_MANAGER
from finetune_operator.errors import NotFoundError


class Reader(Protocol):
    """Reads from the API server, as `ApiConnection` does."""

    async def request(self, verb: str, path: str) -> Json: ...


class Connection(Protocol):
    """Requests to the API server, as `ApiConnection` sends them."""

    async def request(
        self,
        verb: str,
        path: str,
        body: Json | None = None,
        *,
        query: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Json: ...


async def find(connection: Reader, path: str) -> Json | None:
    """Returns an object, or None if it does not exist."""
    try:
        return await connection.request("GET", path)
    except NotFoundError:
        return None


async def merge(connection: Connection, path: str, metadata: Json, changes: Json) -> Json:
    """Patches an object as it was read: the API server answers 409 if its UID or version has changed."""
    seen = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
    body = changes | {"metadata": changes.get("metadata", {}) | seen}
    query = {"fieldManager": FIELD_MANAGER}
    return await connection.request("PATCH", path, body, query=query, content_type=MERGE_PATCH)
