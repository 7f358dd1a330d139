"""Commands that read once: list, describe, estimate, top."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from finetune_api.base import Json
from finetune_client.connection import TIMEOUT, Cluster
from finetune_client.errors import ClientError, Exit
from finetune_client.pods import event_lines
from finetune_client.rows import ENDED, ON_GPU, WAITING, Row, sorted_rows
from finetune_client.terminal.fitted import Cell, Fitted, fit_table
from finetune_client.terminal.screen import print_facts, print_line
from finetune_client.terminal.text import find, number, word
from finetune_client.terminal.usage import describe_usage

GIBIBYTE = 1 << 30
_TOP_LEAST = {"QUEUE": 12, "NAMESPACE": 12}


def list_jobs(cluster: Cluster, out: Console, names: Sequence[str], *, everywhere: bool, form: str) -> None:
    """Print jobs as a table, as names, or as the API server has them."""
    jobs = [cluster.get_job(name) for name in names] or cluster.list_jobs(None if everywhere else cluster.namespace)
    if form in ("json", "yaml"):
        _print_objects(out, jobs, form, single=len(names) == 1)
    elif form == "name":
        for row in sorted_rows(jobs):
            print_line(out, f"finetunejob.finetune.dev/{row.name}")
    elif jobs:
        _print_fitted(out, _job_table(sorted_rows(jobs), out.width, everywhere=everywhere, wide=form == "wide"))
    else:
        where = "the cluster" if everywhere else f"namespace {cluster.namespace}"
        print_line(out, f"no jobs in {where}: `finetune submit job.yaml` makes one")


def _print_objects(out: Console, jobs: list[Json], form: str, *, single: bool) -> None:
    document: Json = jobs[0] if single else {"apiVersion": "v1", "kind": "List", "items": jobs}
    # Both formats write control characters as escapes.
    text = json.dumps(document, indent=2) if form == "json" else yaml.safe_dump(document, sort_keys=False)
    out.out(text.rstrip("\n"), highlight=False)


def _print_fitted(out: Console, fitted: Fitted) -> None:
    out.print(fitted.table)
    if fitted.note:
        out.print(Text(fitted.note, style="dim"))


def _job_table(rows: list[Row], width: int, *, everywhere: bool, wide: bool) -> Fitted:
    first = ("NAMESPACE",) if everywhere else ()
    last = ("STEPS", "RETRIES", "GPUS", "QUEUE", "MODEL") if wide else ()
    titles = (*first, "NAME", "PHASE", "REASON", "PROGRESS", "LOSS", "ETA", "AGE", *last)

    lines: list[list[Cell]] = []
    for row in rows:
        cells = [row.namespace] if everywhere else []
        cells += [row.name, row.phase or "-", row.reason, f"{row.percent}%", row.loss_text, row.eta, row.age]
        cells += [row.steps_text, str(row.retries), str(row.gpus), row.queue, row.model] if wide else []
        lines.append([Text(cell, style=row.style if cell is row.phase else "") for cell in cells])
    drop = (
        *(title for title in ("MODEL", "RETRIES", "STEPS", "QUEUE", "GPUS") if title in last),
        "AGE",
        "ETA",
        "LOSS",
        "PROGRESS",
    )
    return fit_table(titles, lines, width, drop, {"NAME": 24, "REASON": 18} | dict.fromkeys(first, 16))


def describe_job(cluster: Cluster, out: Console, name: str) -> None:
    """Print what a job is, how it is, why, and its latest events."""
    job = cluster.get_job(name)
    row = Row.of(job)
    facts = {
        "job": f"{row.namespace}/{row.name}, made {row.age} ago",
        "model": row.model,
        "data": word(job, "spec", "dataset", "source"),
        "phase": row.phase + (f" ({row.reason})" if row.reason else ""),
        "message": row.message,
        "what to do": word(job, "status", "failure", "hint"),
        "progress": "  ".join(filter(None, (f"{row.percent} %", row.steps_text, row.eta and f"{row.eta} left"))),
        "loss": row.loss_text,
        "evaluation": word(job, "status", "progress", "evalLoss", limit=12),
        "checkpoint": word(job, "status", "checkpointStep") and f"step {word(job, 'status', 'checkpointStep')}",
        "used": describe_usage(job),
        "results": word(job, "status", "resultLocation"),
        "manifest": word(job, "status", "manifestUri"),
    }
    print_facts(out, facts)

    _print_list(out, "conditions", _condition_lines(job))
    _print_list(out, "attempts", _attempt_lines(job))
    _print_list(out, "artifacts", _artifact_lines(job))
    try:
        _print_list(out, "events", event_lines(cluster, job)[-10:])
    except ClientError as error:
        _print_list(out, "events", [error.message])


def _print_list(out: Console, title: str, lines: list[str]) -> None:
    for line in [title, *(f"  {line}" for line in lines)] if lines else ():
        print_line(out, line)


def _objects(job: Json, *path: str) -> list[Json]:
    return [each for each in find(job, *path) or () if isinstance(each, dict)]


def _condition_lines(job: Json) -> list[str]:
    return [
        f"{word(each, 'type', limit=32):<12}{word(each, 'status', limit=8):<8}{word(each, 'reason', limit=64)}"
        f"  {word(each, 'message', limit=320)}".rstrip()
        for each in _objects(job, "status", "conditions")
    ]


def _attempt_lines(job: Json) -> list[str]:
    return [
        f"{word(each, 'pod', limit=253)}  {word(each, 'startTime', limit=32)} to "
        f"{word(each, 'endTime', limit=32) or 'now'}"
        f"  {word(each, 'reason', limit=64)}".rstrip()
        for each in _objects(job, "status", "attempts")
    ]


def _artifact_lines(job: Json) -> list[str]:
    return [
        f"{word(each, 'type', limit=32):<14}{word(each, 'quantization', limit=16):<8}"
        f"{number(each, 'bytes') or 0:>16,.0f} bytes  {word(each, 'uri')}"
        for each in _objects(job, "status", "artifacts")
    ]


def estimate_job(cluster: Cluster, out: Console, name: str) -> Exit:
    """Print what preflight has found out: rows, steps, GPU memory and GPU hours."""
    job = cluster.get_job(name)
    found = find(job, "status", "preflight")
    result = word(found, "result", limit=16)
    if not result:
        skipped = word(job, "spec", "runPolicy", "preflight", limit=16) == "Skip"
        why = "its manifest says runPolicy.preflight: Skip" if skipped else "its checks have not ended"
        message = f"job {Row.of(job).name} has no estimate: {why}; `finetune validate job.yaml` estimates here"
        raise ClientError(message)

    memory, smallest = (number(found, key) for key in ("gpuMemoryBytes", "smallestGpuMemoryBytes"))
    hours = number(found, "gpuHours")
    facts = {
        "checks": f"{result}, {_count(found, 'errors')}, {_count(found, 'warningCount', 'warnings')}",
        "rows": _join(word(found, "rows"), number(found, "badRows") and f"{word(found, 'badRows')} of them unusable"),
        "steps": word(found, "steps"),
        "GPU": word(found, "gpu"),
        "GPU memory": _join(
            memory and f"{memory / GIBIBYTE:.1f} GiB",
            smallest and f"{smallest / GIBIBYTE:.1f} GiB with memory: Smallest",
        ),
        "GPU hours": "unknown, as spec.resources names no known GPU" if hours is None else f"{hours:.2f}",
        "cost": _estimated_cost(job),
        "report": word(found, "reportUri"),
    }
    print_facts(out, facts)
    for warning in list(find(found, "warnings") or ())[:5]:
        print_line(out, f"warning: {word({'text': warning}, 'text', limit=320)}")
    return Exit.OK if result == "Passed" else Exit.JOB_FAILED


def _count(found: Any, field: str, words: str = "") -> str:
    count = int(number(found, field) or 0)
    return f"{count} {(words or field)[: -1 if count == 1 else None]}"


def _estimated_cost(job: Json) -> str:
    usage = find(job, "status", "usage")
    cost = number(usage, "estimatedCost")
    if cost is None:
        return "unknown, as the job has no price or no estimated time (docs/cost.md)"
    return f"{cost:,.2f} {word(usage, 'currency', limit=3)}"


def _join(*parts: Any) -> str:
    return ", ".join(part for part in parts if part)


def show_top(cluster: Cluster, out: Console, *, everywhere: bool) -> None:
    """Print the GPUs by job and by queue, beside what the nodes offer."""
    rows = [row for row in sorted_rows(cluster.list_jobs(None if everywhere else cluster.namespace)) if row.gpus]
    for fitted in top_tables(rows, out.width):
        _print_fitted(out, fitted)
        print_line(out, "")
    try:
        offered = gpus_of_nodes(cluster, {row.gpu_resource for row in rows})
    except ClientError as error:
        print_line(out, f"the nodes' GPUs are not shown: {error.message}")
        return
    for resource, count in offered.items():
        held = sum(row.gpus for row in rows if row.gpu_resource == resource and row.phase in ON_GPU)
        print_line(out, f"{resource}: these jobs hold {held} of the {count} that the nodes offer")


def top_tables(rows: list[Row], width: int) -> tuple[Fitted, Fitted]:
    """Return the table of jobs that hold or wait for GPUs, and that of the queues."""
    jobs: list[list[Text]] = []
    queues: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in sorted((each for each in rows if each.phase not in ENDED), key=lambda each: each.phase not in ON_GPU):
        cells = (row.namespace, row.name, row.queue or "-", row.phase or "-", str(row.gpus), row.gpu_resource)
        jobs.append([Text(cell, style=row.style) for cell in (*cells, f"{row.percent}%", row.eta)])
        held = queues[row.namespace, row.queue or "-", row.gpu_resource]
        held[0] += row.gpus if row.phase in ON_GPU else 0
        held[1] += row.gpus if row.phase in WAITING else 0

    titles = ("NAMESPACE", "NAME", "QUEUE", "PHASE", "GPUS", "RESOURCE", "PROGRESS", "ETA")
    totals = [[Text(cell) for cell in (*key, str(held), str(waited))] for key, (held, waited) in sorted(queues.items())]
    names = ("NAMESPACE", "QUEUE", "RESOURCE", "HELD", "WAITED FOR")
    return (
        fit_table(titles, jobs, width, ("RESOURCE", "ETA", "PROGRESS"), {"NAME": 20} | _TOP_LEAST),
        fit_table(names, totals, width, (), {"RESOURCE": 14} | _TOP_LEAST),
    )


def gpus_of_nodes(cluster: Cluster, resources: set[str]) -> dict[str, int]:
    """Add up what the nodes offer of each extended resource. Raises ClientError without the right to list nodes."""
    with cluster.explained("list", "nodes", ""):
        nodes = cluster.core.list_node(_request_timeout=TIMEOUT).items
    counted = dict.fromkeys(sorted(resources), 0)
    for node in nodes:
        for resource in counted:
            offered = str((node.status.allocatable or {}).get(resource, "0"))
            counted[resource] += int(offered) if offered.isdecimal() else 0
    return counted
