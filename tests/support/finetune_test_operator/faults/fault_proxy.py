"""The proxy before the API server that carries plans out: a job may have one fault, at one of its requests or events.

It also counts what every job caused, which is the trace that plans are generated from.
"""

import asyncio
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from finetune_api.base import Json
from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.api_proxy import ApiProxy, end_to_end
from finetune_test_operator.faults.plans import REFUSALS, STALE, Plan

JOB = re.compile(r"life-\d{4}")
"""Jobs of the suite are called so, and their children's names begin so: any request names its job."""

SILENCE_SECONDS = 90.0  # longer than any client waits
EVENT_DELAY_SECONDS = 3.0
LATE_SECONDS = 300.0  # longer than any life
GONE: Json = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410}
FAILED: Json = GONE | {"reason": "InternalError", "code": 500}


@dataclass
class Course:
    """What one job caused, and the plan that it lives under."""

    plan: Plan | None = None
    fired: bool = False
    places: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When its requests came; reading of the monotonic clock."""

    creates: list[str] = field(default_factory=list)
    """Paths of objects that were created, as the API server confirmed."""

    deletes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    """By place: the cluster's version in the newest list there; "" holds that of the job's creation."""

    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by the life when its job is over: late writes arrive then."""

    def note(self, place: str) -> bool:
        """Count a request or event; True if the plan's fault is due now."""
        self.places.append(place)
        due = self.plan is not None and not self.fired and self.plan.place == place
        if due and self.plan and self.places.count(place) == self.plan.number:
            self.fired = True
            return True
        return False


class FaultProxy(ApiProxy):
    """Forwards requests and events, and does to them what the plans say."""

    def __init__(self, cluster: DevCluster) -> None:
        super().__init__(cluster)
        self.courses: dict[str, Course] = defaultdict(Course)
        self.kill: Callable[[], None] = lambda: None
        """Ends the operator at once."""

        self._late: set[asyncio.Task[None]] = set()
        self._old: dict[str, list[str]] = defaultdict(list)
        """By place of a list of all jobs: versions at which the next ones are answered."""

    def is_over(self, job: str) -> None:
        """Let what was held back for a job arrive."""
        self._loop.call_soon_threadsafe(self.courses[job].over.set)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.query.get("watch") == "true":
            return await self._stream(request)

        found = JOB.search(request.path_qs) or JOB.search(body.decode(errors="replace"))
        if found is None:
            old = self._old[read_place(request.method, request.path)]
            return await self._answer(request, body, version=old.pop() if old else "")

        course, place = self.courses[found[0]], read_place(request.method, request.path)
        course.times.append(time.monotonic())
        if not course.note(place) or course.plan is None:
            return await self._answer(request, body, course)
        return await self._fail(request, body, course, course.plan.fault)

    async def _fail(self, request: web.Request, body: bytes, course: Course, fault: str) -> web.StreamResponse:
        if fault in REFUSALS:
            return _refuse(REFUSALS[fault], request.method)
        if fault == STALE:
            place = read_place(request.method, request.path)
            return await self._answer(request, body, course, course.versions.get(place, course.versions[""]))
        if fault == "late":
            task = asyncio.create_task(self._arrive_late(request, body, course))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
        if fault == "kill-after":
            answer = await self._answer(request, body, course)
            self.kill()
            return answer

        if fault.endswith("-commit"):
            await self._ask(request, body, course)
        if fault.startswith(("kill", "late")):
            self.kill()
        if fault.startswith("timeout"):
            await asyncio.sleep(SILENCE_SECONDS)
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=502)

    async def _arrive_late(self, request: web.Request, body: bytes, course: Course) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(course.over.wait(), LATE_SECONDS)
        await self._ask(request, body, None)  # nobody decides this any more: what it makes need only go away again

    async def _ask(
        self, request: web.Request, body: bytes, course: Course | None, version: str = ""
    ) -> tuple[int, Any, bytes]:
        """Send a request on, and return the whole answer. `version`: list what was there then."""
        url = self._target + request.path_qs
        if version:
            url += f"{'&' if request.query_string else '?'}resourceVersion={version}&resourceVersionMatch=Exact"
        async with self._client.request(
            request.method, url, data=body or None, headers=end_to_end(request.headers)
        ) as answer:
            content = await answer.read()

        place = read_place(request.method, request.path)
        if course is not None and request.method == "POST" and answer.status == 201:
            course.creates.append(place)
        if course is not None and request.method == "DELETE" and answer.status < 300:
            course.deletes.append(request.path)
        if course is not None and request.method == "GET" and answer.status == 200:
            course.versions[place] = json.loads(content)["metadata"]["resourceVersion"]
            course.versions.setdefault("", course.versions[place])
        return answer.status, end_to_end(answer.headers), content

    async def _answer(
        self, request: web.Request, body: bytes, course: Course | None = None, version: str = ""
    ) -> web.StreamResponse:
        status, headers, content = await self._ask(request, body, course, version)
        response = web.StreamResponse(status=status, headers=headers)
        with suppress(ConnectionError):  # the client may go away at any time
            await response.prepare(request)
            await response.write(content)
            await response.write_eof()
        return response

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """Pass a watch on, an event a line."""
        resource = read_place("GET", request.path).split()[1]
        async with self._client.request(
            "GET", self._target + request.path_qs, headers=end_to_end(request.headers)
        ) as answer:
            response = web.StreamResponse(status=answer.status, headers=end_to_end(answer.headers))
            await response.prepare(request)
            stream, rest = EventStream(response), b""
            with suppress(ConnectionError):  # the client may go away at any time
                async for chunk in answer.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        await self._pass_event(stream, resource, line)
            return response

    async def _pass_event(self, stream: "EventStream", resource: str, line: bytes) -> None:
        metadata = (json.loads(line).get("object") or {}).get("metadata", {}) if line else {}
        found = JOB.search(str(metadata.get("name", "")))
        course = self.courses[found[0]] if found else None
        if course is not None:
            course.versions.setdefault("", metadata["resourceVersion"])
        if course is None or not course.note(f"EVENT {resource}") or course.plan is None:
            await stream.send(line)
            return
        if course.plan.fault == STALE:
            # Of the watch that begins anew, and of the comparison of all jobs that follows.
            self._old[f"LIST {resource}"] = [course.versions[""]] * 2
        await stream.disturb(course.plan.fault, line)


class EventStream:
    """One watch, towards the operator."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response
        self._held: bytes | None = None
        self._is_silent = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def send(self, line: bytes) -> None:
        """Send an event, and behind it the one that it was to overtake."""
        if self._is_silent:
            return
        await self._write(line)
        if self._held is not None:
            held, self._held = self._held, None
            await self._write(held)

    async def disturb(self, fault: str, line: bytes) -> None:
        """Do to an event what the plan says; a lost one is followed by a new list, as after a broken connection."""
        if fault == "duplicate":
            await self._write(line)
            await self._write(line)
        elif fault == "reorder":
            self._held = line
            self._later(self.send(b""))
        elif fault == "delay":
            self._later(self._write(line))
        elif fault == "drop":
            self._later(self._write(_event("ERROR", GONE)))
        elif fault == "half-open":
            self._is_silent = True
        else:
            await self._write(_event("ERROR", FAILED if fault == "error" else GONE))

    def _later(self, work: Any) -> None:
        async def wait() -> None:
            await asyncio.sleep(EVENT_DELAY_SECONDS)
            with suppress(ConnectionError):
                await work

        task = asyncio.create_task(wait())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, line: bytes) -> None:
        if line:
            await self._response.write(line + b"\n")


def read_place(method: str, path: str) -> str:
    """The kind of a request: verb, resource and subresource, without names."""
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if len(parts) > 2 and parts[0] == "namespaces":
        parts = parts[2:]
    verb = "LIST" if method == "GET" and len(parts) == 1 else method
    return f"{verb} {'/'.join([*parts[:1], *parts[2:3]])}"


def _event(kind: str, status: Json) -> bytes:
    return json.dumps({"type": kind, "object": status}).encode()


def _refuse(code: int, method: str) -> web.Response:
    headers = {"Retry-After": "1"} if code == 429 else {}
    conflict = "AlreadyExists" if method == "POST" else "Conflict"
    reason = {409: conflict, 403: "Forbidden"}.get(code, "InternalError")
    status = GONE | {"code": code, "reason": reason, "message": "a fault of the test"}
    return web.json_response(status, status=code, headers=headers)
