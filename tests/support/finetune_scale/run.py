"""`make scale`: thousands of FineTuneJobs from creation to their end, with simulated pods on a real control plane.

    python -P -m finetune_scale.run --jobs 5000 --reporting 200 --csv docs/scale.csv

Phases: jobs are created at a steady rate, and the first of them train and report until all others have ended; then
only these report; then `CALM_JOBS` further ones come, one a second, beside them; then the first ones end too; then
nothing changes; then the operator starts anew, twice: once to see what a restart writes, and once to see how long a new
job waits for it. Times of the further jobs (`calm_`) are those of a cluster that holds all the others; the first jobs'
own are those of a rush, in which the whole control plane shares this machine's cores.
"""

import argparse
import asyncio
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from finetune_devcluster.cluster import DevCluster
from finetune_scale.api import MERGE, Api, job_path
from finetune_scale.costs import ProcessWatch, Requests
from finetune_scale.load import create_jobs, create_namespaces, job_name, namespace_of
from finetune_scale.nodes import Nodes
from finetune_scale.reporters import Reporters
from finetune_scale.sightings import Sightings
from finetune_test_operator.operator_process import OperatorProcess

STEADY_SECONDS = 60.0
CALM_JOBS = 200
CALM_PER_SECOND = 1.0
SETTLING_SECONDS = 140.0
"""Two of the operator's lists: then it has seen that nothing changes any more."""
IDLE_SECONDS = 120.0
RESTART_SECONDS = 90.0


def main() -> None:
    """Run all phases, print the figures and append them to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--reporting", type=int, default=200, help="jobs that report once a second")
    parser.add_argument("--per-second", type=float, default=8.0, help="jobs created a second")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()

    with DevCluster.start() as cluster, tempfile.TemporaryDirectory() as folder:
        operator = OperatorProcess(cluster, Path(folder) / "operator")
        try:
            figures = asyncio.run(_Run(cluster, operator, options.jobs, options.reporting).measure(options.per_second))
        finally:
            operator.stop()

    for name, value in figures.items():
        print(f"{name:<36} {value}")
    if options.csv:
        _append(options.csv, figures)


class _Run:
    def __init__(self, cluster: DevCluster, operator: OperatorProcess, jobs: int, reporting: int) -> None:
        self._cluster = cluster
        self._operator = operator
        self._jobs = jobs
        self._reporting = range(reporting)
        self._figures: dict[str, Any] = {"jobs": jobs, "reporting": reporting}

    async def measure(self, per_second: float) -> dict[str, Any]:
        """Return all figures by name."""
        self._figures["jobs_per_s"] = per_second
        self._operator.start()
        async with Api.open(self._cluster) as api:
            await create_namespaces(api)
            nodes, sightings = Nodes(api, self._reporting), Sightings(api)
            process = ProcessWatch(self._operator.pid)

            async def lives_and_rest() -> None:
                await self._all_lives(api, nodes, sightings, process, per_second)
                await self._idle(api)
                self._figures["max_rss_mib"] = round(process.max_rss / 2**20, 1)

            await _first(lives_and_rest(), nodes.play(), sightings.watch(), sightings.watch_jobs(), process.watch())
            await self._restart(api)
        return self._figures

    async def _all_lives(
        self, api: Api, nodes: Nodes, sightings: Sightings, process: ProcessWatch, per_second: float
    ) -> None:
        """Measure from the first creation to the last end."""
        figures, before, begun, cpu = self._figures, await Requests.count(api), time.monotonic(), process.cpu_seconds
        reporters = Reporters(api, self._operator.progress_url, self._operator.tls())

        async with asyncio.TaskGroup() as tasks:
            creation = tasks.create_task(create_jobs(api, range(self._jobs), per_second))
            await _until(lambda: len(nodes.started.keys() & set(self._reporting)) == len(self._reporting), "pods run")
            posting = [
                tasks.create_task(reporters.report(number, nodes.pods[number], 1.0)) for number in self._reporting
            ]

            short = self._jobs - len(self._reporting)
            await _until(lambda: sightings.count("Succeeded") >= short, "all jobs that do not report have ended")
            await creation
            figures["minutes_of_load"] = round((time.monotonic() - begun) / 60, 1)
            figures["operator_cores_of_load"] = round((process.cpu_seconds - cpu) / (time.monotonic() - begun), 2)

            await self._only_reports(api, process, reporters)
            await create_jobs(api, range(self._jobs, self._jobs + CALM_JOBS), CALM_PER_SECOND)
            await _until(lambda: sightings.count("Succeeded") >= short + CALM_JOBS, "the further jobs have ended")
            for task in posting:
                task.cancel()

        for number in self._reporting:
            await nodes.end(number)
            await asyncio.sleep(1 / per_second)  # as the others: they do not all end at once
        every = self._jobs + CALM_JOBS
        await _until(lambda: sightings.count("Succeeded") == every, "all jobs have ended")

        progress_writes = sum(len(steps) for steps in sightings.steps.values())
        cost = (await Requests.count(api)).since(before)
        figures["writes_per_job_without_progress"] = round((cost.writes - progress_writes) / every, 2)
        figures["reads_per_job"] = round(cost.reads / every, 2)
        figures["reports"] = dict(reporters.answers)
        figures |= _percentiles("post_s", reporters.seconds)
        figures |= _latencies(nodes, sightings, range(self._jobs), "")
        figures |= _percentiles("report_to_status_s", _report_ages(reporters, sightings))
        figures |= _latencies(nodes, sightings, range(self._jobs, every), "calm_")

    async def _only_reports(self, api: Api, process: ProcessWatch, reporters: Reporters) -> None:
        """Measure what the jobs cost that train and report."""
        before, cpu, reports = await Requests.count(api), process.cpu_seconds, sum(reporters.answers.values())
        begun = time.monotonic()
        await asyncio.sleep(STEADY_SECONDS)
        seconds, cost = time.monotonic() - begun, (await Requests.count(api)).since(before)

        figures = self._figures
        figures["steady_reports_per_s"] = round((sum(reporters.answers.values()) - reports) / seconds, 1)
        figures["steady_writes_per_job_and_10_s"] = round(10 * cost.writes / seconds / len(self._reporting), 2)
        figures["steady_reads_per_s"] = round(cost.reads / seconds, 2)
        figures["steady_token_reviews_per_s"] = round(cost.reviews / seconds, 2)
        figures["steady_operator_cores"] = round((process.cpu_seconds - cpu) / seconds, 2)

    async def _idle(self, api: Api) -> None:
        await asyncio.sleep(SETTLING_SECONDS)
        before, begun = await Requests.count(api), time.monotonic()
        await asyncio.sleep(IDLE_SECONDS)
        cost, seconds = (await Requests.count(api)).since(before), time.monotonic() - begun
        self._figures["idle_reads_per_s"] = round(cost.reads / seconds, 2)
        self._figures["idle_writes"] = cost.writes

    async def _restart(self, api: Api) -> None:
        self._operator.stop()
        before = await Requests.count(api)
        self._operator.start()
        await asyncio.sleep(RESTART_SECONDS)
        self._figures["restart_writes"] = (await Requests.count(api)).since(before).writes
        self._figures["restart_rss_mib"] = round(ProcessWatch(self._operator.pid).rss / 2**20, 1)

        self._operator.stop()
        self._operator.start()
        path = job_path(namespace_of(0), job_name(0))
        begun = time.monotonic()
        generation = await api.request("PATCH", path, {"spec": {"runPolicy": {"ttlSecondsAfterFinished": 7200}}}, MERGE)
        while True:
            job = await api.request("GET", path)
            if job["status"]["observedGeneration"] == generation["metadata"]["generation"]:
                break
            await asyncio.sleep(0.02)
        self._figures["event_after_restart_s"] = round(time.monotonic() - begun, 2)


async def _first(main: Coroutine[Any, Any, None], *beside: Coroutine[Any, Any, None]) -> None:
    """Run until `main` has ended; what runs beside it has no end but a failure."""
    tasks = [asyncio.create_task(each) for each in (main, *beside)]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until(holds: Callable[[], bool], what: str, seconds: float = 3600) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        await asyncio.sleep(0.1)


def _latencies(nodes: Nodes, sightings: Sightings, jobs: range, prefix: str) -> dict[str, float]:
    """Times from what happened to some jobs to what the user saw of it."""
    succeeded = sightings.phases["Succeeded"]
    # A job whose status went on to its end at once counts, too: until then its start was not to be seen.
    running = sightings.first("Running", "Exporting", "Uploading", "Succeeded")
    causes = {
        "pod_runs_to_status_s": (nodes.started, running),
        "pod_ends_to_status_s": (nodes.ended, succeeded),
        "job_completes_to_status_s": (sightings.completed, succeeded),
    }

    figures: dict[str, float] = {}
    for name, (cause, effect) in causes.items():
        seconds = [max(0.0, effect[number] - cause[number]) for number in jobs if number in cause and number in effect]
        figures |= _percentiles(prefix + name, seconds)
    return figures


def _report_ages(reporters: Reporters, sightings: Sightings) -> list[float]:
    """Age of each report when its step was seen in the status."""
    return [
        seen - reporters.sent[number][step - 1] for number in reporters.sent for seen, step in sightings.steps[number]
    ]


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {f"{name}_p50": round(cuts[49], 3), f"{name}_p99": round(cuts[98], 3), f"{name}_max": round(max(seconds), 3)}


def _append(path: Path, figures: dict[str, Any]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(figures))
        if is_new:
            writer.writeheader()
        writer.writerow(figures)


if __name__ == "__main__":
    main()
