"""Logs and events of a job, read with the user's own rights: the operator has none on logs."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from finetune_api.base import Json
from finetune_api.vocabulary import COMPONENT_LABEL, JOB_UID_LABEL, TRAINER_CONTAINER
from finetune_client.connection import TIMEOUT, Cluster
from finetune_client.errors import ClientError, Exit
from finetune_client.rows import Row
from finetune_client.terminal.screen import print_line
from finetune_client.terminal.text import clean

MAX_LINE = 4096
"""Characters of a line of a log."""
SECONDS_BETWEEN_LOOKS = 2
SILENT_SECONDS = 7 * 86_400
"""Time that a log which is followed may be silent: the client takes no word for ever."""

_NEVER = datetime.min.replace(tzinfo=UTC)


def print_logs(cluster: Cluster, out: Console, name: str, options: Any) -> None:
    """Print the log of a job's attempt: the latest, or number `--attempt`; of preflight with `--preflight`."""
    component = "preflight" if options.preflight else "trainer"
    pod = _find_pod(cluster, name, component, options.attempt)

    with cluster.explained("get", "pods/log", cluster.namespace):
        answer = cluster.core.read_namespaced_pod_log(
            pod,
            cluster.namespace,
            container=TRAINER_CONTAINER,
            follow=options.follow,
            tail_lines=options.tail,
            _preload_content=False,
            _request_timeout=(TIMEOUT[0], SILENT_SECONDS) if options.follow else TIMEOUT,
        )
        for line in _lines(answer):
            print_line(out, clean(line, MAX_LINE))


def _find_pod(cluster: Cluster, name: str, component: str, attempt: int | None) -> str:
    job = Row.of(cluster.get_job(name))
    selector = f"{JOB_UID_LABEL}={job.uid},{COMPONENT_LABEL}={component}"
    with cluster.explained("list", "pods", cluster.namespace):
        found = cluster.core.list_namespaced_pod(
            cluster.namespace, label_selector=selector, _request_timeout=TIMEOUT
        ).items

    # Times are whole seconds: of two pods of one second, the one that has ended came first.
    ended = ("Succeeded", "Failed")
    pods = sorted(found, key=lambda pod: (pod.metadata.creation_timestamp, pod.status.phase not in ended))
    if not pods:
        message = (
            f"job {job.name} has no pod of its {component} any more, or not yet (phase {job.phase or 'unknown'}): "
            f"`finetune describe {job.name}` says why"
        )
        raise ClientError(message, Exit.NOT_FOUND)

    if attempt is not None and not 1 <= attempt <= len(pods):
        message = f"job {job.name} has {len(pods)} pods of its {component}: write --attempt 1 to {len(pods)}"
        raise ClientError(message, Exit.NOT_FOUND)
    return str(pods[-1 if attempt is None else attempt - 1].metadata.name)


def _lines(answer: Any) -> Iterator[str]:
    """Split a streamed log into lines; an endless line is cut into pieces of bounded size."""
    rest = b""
    for chunk in answer.stream(8192):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
        if len(rest) > 4 * MAX_LINE:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")


def event_lines(cluster: Cluster, job: Json) -> list[str]:
    """Return a job's events as lines, oldest first. Raises ClientError."""
    uid = str(job["metadata"]["uid"])
    with cluster.explained("list", "events", cluster.namespace):
        found = cluster.core.list_namespaced_event(
            cluster.namespace, field_selector=f"involvedObject.uid={uid}", _request_timeout=TIMEOUT
        ).items
    # Times are whole seconds; within one, the API server's own count is the order.
    events = sorted(found, key=lambda event: (_time_of(event), int(event.metadata.resource_version)))
    return [
        f"{_time_of(event):%H:%M:%S}  {clean(event.type or '', 16):<8}{clean(event.reason or '', 64)}  "
        f"{clean(event.message or '')}"
        for event in events
    ]


def print_events(cluster: Cluster, out: Console, name: str, *, follow: bool) -> None:
    """Print a job's events, and with `follow` those to come."""
    job, shown = cluster.get_job(name), set[str]()
    while True:
        for line in event_lines(cluster, job):
            if line not in shown:
                print_line(out, line)
                shown.add(line)
        if not follow:
            break
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if not shown:
        print_line(out, f"job {Row.of(job).name} has no events: the cluster keeps them for an hour")


def _time_of(event: Any) -> datetime:
    found: datetime = event.last_timestamp or event.event_time or event.metadata.creation_timestamp or _NEVER
    return found
