"""Middleware of kopf's session: answers that kopf cannot read become outages, which it waits for.

kopf ends, and the process with it, at the first answer that is no JSON, at any refusal but a few, and at any error in a
watch but 410. A proxy that signs users in again, or a connection that is cut, is enough for that. A request that fails
to connect it repeats for ever, and after a 410 in a watch it lists again; so that is what it gets to see.
"""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp

LIST_AGAIN = b'{"type": "ERROR", "object": {"kind": "Status", "code": 410}}\n'

_GONE = 410
_WAITED_FOR = (401, 403)
"""Refusals that kopf waits out itself: it logs in again, or tries again. It does so for 429 and 5xx as well."""

_Handler = Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]]
logger = logging.getLogger(__name__)


async def only_usable_answers(request: aiohttp.ClientRequest, handler: _Handler) -> aiohttp.ClientResponse:
    """Passes on what kopf can read. Raises ClientConnectionError for what passes by itself."""
    response = await handler(request)
    if response.status in _WAITED_FOR or response.status >= 500:
        return response

    is_watch = request.url.query.get("watch") == "true"
    problem = await _find_problem(response, is_watch=is_watch)
    if problem is None:
        if is_watch:
            response.content = _Events(response.content)  # type: ignore[assignment]  # kopf reads chunks only
        return response

    response.close()
    # A page of a list that has expired must not be asked for again, but the whole list.
    kind = aiohttp.ClientPayloadError if response.status == _GONE and not is_watch else aiohttp.ClientConnectionError
    raise kind(f"{request.method} {request.url.path}: {problem}")


async def _find_problem(response: aiohttp.ClientResponse, *, is_watch: bool) -> str | None:
    if response.status == 429:
        seconds = response.headers.get("Retry-After", "0")
        return None if seconds.isdecimal() else f"429, and Retry-After is {seconds!r}"
    if response.status >= 400:
        return f"refused with {response.status}"
    if response.content_type != "application/json":
        return f"the answer is {response.content_type}, not JSON; is there a proxy in between?"
    if is_watch:
        return None

    try:
        answer = json.loads(await response.read())
    except (ValueError, aiohttp.ClientPayloadError) as error:
        return f"the answer is cut off or no JSON: {error}"
    return None if isinstance(answer, dict) else "the answer is no object"


class _Events:
    """Body of a watch, a line for each event; ends with `LIST_AGAIN` at the first line that is none."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    def __getattr__(self, name: str) -> Any:  # what aiohttp itself asks for when the response is closed
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        """Yields whole lines."""
        rest, is_empty = b"", True
        async for chunk in self._content.iter_chunked(size):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if not _is_event(line):
                    logger.warning("a watch brought something that is no event, listing again: %r", line[:200])
                    yield LIST_AGAIN
                    return
                is_empty = False
                yield line + b"\n"

        # The API server ends a watch between two events, and after the first bookmark.
        if rest or is_empty:
            logger.warning("a watch was cut off, listing again")
            yield LIST_AGAIN


def _is_event(line: bytes) -> bool:
    try:
        event: Any = json.loads(line)
    except ValueError:
        return False
    if not isinstance(event, dict) or not isinstance(event.get("object"), dict):
        return False
    return event.get("type") != "ERROR" or event["object"].get("code") == _GONE
