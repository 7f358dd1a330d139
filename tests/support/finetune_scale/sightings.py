"""Watches FineTuneJobs as a user does, and notes when each status changed; and their Jobs, as the operator does."""

import time

from finetune_api import PLURAL
from finetune_api.vocabulary import JOB_NAME_LABEL, JOB_UID_LABEL
from finetune_scale.api import FINE_TUNE_JOBS, JOBS, Api
from finetune_scale.load import job_number


class Sightings:
    """Times, in monotonic seconds, at which each job was first seen in a phase and each of its steps was seen."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.phases: dict[str, dict[int, float]] = {}
        """By phase, then by number of the job."""

        self.steps: dict[int, list[tuple[float, int]]] = {}
        """By number of the job: time and step of each change."""

        self.completed: dict[int, float] = {}
        """By number: time at which the Job controller had completed the trainer's Job."""

    async def watch_jobs(self) -> None:
        """Note the ends of Jobs until cancelled."""
        async for event in self._api.watch(f"{JOBS}/jobs", JOB_UID_LABEL):
            job, now = event["object"], time.monotonic()
            conditions = job.get("status", {}).get("conditions") or ()
            if any(each["type"] == "Complete" and each["status"] == "True" for each in conditions):
                self.completed.setdefault(job_number(job["metadata"]["labels"][JOB_NAME_LABEL]), now)

    async def watch(self) -> None:
        """Note changes until cancelled."""
        async for event in self._api.watch(f"{FINE_TUNE_JOBS}/{PLURAL}"):
            now = time.monotonic()
            job = event["object"]
            number, status = job_number(job["metadata"]["name"]), job.get("status", {})
            if "phase" in status:
                self.phases.setdefault(status["phase"], {}).setdefault(number, now)

            step = status.get("progress", {}).get("step")
            seen = self.steps.setdefault(number, [])
            if step is not None and (not seen or seen[-1][1] != step):
                seen.append((now, step))

    def first(self, *phases: str) -> dict[int, float]:
        """Time, by number of the job, at which it was first seen in one of the phases."""
        found: dict[int, float] = {}
        for phase in phases:
            for number, seen in self.phases.get(phase, {}).items():
                found[number] = min(seen, found.get(number, seen))
        return found

    def count(self, phase: str) -> int:
        """Number of jobs that have been in a phase."""
        return len(self.phases.get(phase, {}))
