"""Writes of a status, also under a CRD that is older than this operator.

Server-side apply refuses an object with a field that its CRD does not declare, and answers 500, as if the server were
in trouble. Such a CRD stands in a cluster where it was rolled back alone, or where another tool than the chart installs
it. Then the fields that it declares are written, and the log names the others.
"""

import copy
import logging
import re
from typing import Any, Final, Protocol

from finetune_api.base import Json
from finetune_operator.cluster.connection import APPLY
from finetune_operator.desired.names import FIELD_MANAGER
from finetune_operator.errors import ApiUnavailableError

logger = logging.getLogger(__name__)

_UNDECLARED: Final = re.compile(r"(\.status\.[^\n]+?): field not declared in schema")
_ITEM: Final = re.compile(r"\[[^\]]*\]")  # of a list, by its index or its keys

Field = tuple[str, ...]
"""Names of a field and of those it is in, from the outermost; the items of a list share one."""


class Connection(Protocol):
    """Requests to the API server, as `ApiConnection` sends them."""

    async def request(
        self, verb: str, path: str, body: Json | None = None, *, query: dict[str, str] | None, content_type: str
    ) -> Json: ...


class StatusWriter:
    """Applies statuses. Says once which fields the CRD lacks."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._named: set[Field] = set()

    async def apply(self, path: str, body: Json) -> Json:
        """Returns the object as it is stored; `body` has kind, metadata and status. Raises ApiError or
        ApiUnavailableError."""
        # Forced, because nobody else may own a field of the status.
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        while True:
            try:
                return await self._connection.request("PATCH", path, body, query=query, content_type=APPLY)
            except ApiUnavailableError as error:
                fields = find_undeclared(str(error))
                rest = leave_out(body, fields)
                if rest == body:
                    raise
                self._name(fields)
                body = rest

    def _name(self, fields: set[Field]) -> None:
        for field in sorted(fields - self._named):
            logger.warning(
                "the CRD in this cluster is older than this operator and lacks %s, so that field is not shown: "
                "install the CRD of this version, which the chart has",
                ".".join(field),
            )
        self._named |= fields


def find_undeclared(message: str) -> set[Field]:
    """Finds the fields of a status that the CRD lacks in the API server's refusal (pure)."""
    return {tuple(_ITEM.sub("", path).strip(".").split(".")) for path in _UNDECLARED.findall(message)}


def leave_out(body: Json, fields: set[Field]) -> Json:
    """Returns a copy of an object without some of its fields (pure)."""
    rest: Json = copy.deepcopy(body)
    for *parents, name in fields:
        found: list[Any] = [rest]
        for parent in parents:
            inner = [each.get(parent) for each in found if isinstance(each, dict)]
            found = [item for each in inner for item in (each if isinstance(each, list) else [each])]

        for each in found:
            if isinstance(each, dict):
                each.pop(name, None)
    return rest
