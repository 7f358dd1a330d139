"""Creates FineTuneJobs at a steady rate, over a number of namespaces."""

import asyncio
import time

from finetune_api.base import Json
from finetune_scale.api import Api, job_path

NAMESPACES = 10


def namespace_of(number: int) -> str:
    """Namespace of job number `number`."""
    return f"team-{number % NAMESPACES}"


def job_name(number: int) -> str:
    """Name of job number `number`."""
    return f"job-{number}"


def job_number(name: str) -> int:
    """Number of a job with this name."""
    return int(name.removeprefix("job-"))


async def create_namespaces(api: Api) -> None:
    """Create the namespaces of all jobs."""
    for number in range(NAMESPACES):
        await api.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace_of(number)}})


async def create_jobs(api: Api, numbers: range, per_second: float) -> None:
    """Create the jobs of these numbers; number 0 and the next ones will report for as long as the run lasts."""
    begun = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for number in numbers:
            await asyncio.sleep(max(0.0, begun + (number - numbers.start) / per_second - time.monotonic()))
            tasks.create_task(api.request("POST", job_path(namespace_of(number)), _manifest(number)))


def _manifest(number: int) -> Json:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": job_name(number)},
        "spec": {
            "model": {"source": "s3://models/tiny/"},
            "dataset": {"source": "s3://data/chat.jsonl"},
            "output": {"s3": {"bucket": "results"}},
            "resources": {"gpus": 0},
            "runPolicy": {"preflight": "Skip"},
        },
    }
