"""Series about the jobs that exist, made when they are asked for, from what the last look at each job found.

No request is made for them. Only the replica that leads looks at jobs, so only it exports them.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_api.vocabulary import Phase
from finetune_operator.metrics.series import REGISTRY


@dataclass(frozen=True, slots=True)
class JobFacts:
    """Facts of one job that are counted."""

    phase: Phase
    needs_person: str
    """Reason for which nothing goes on without a person; empty if something does, or if the job is over."""

    created: float
    """Unix time."""

    gpus: int
    """GPUs that the spec asks for."""

    tokens_per_second: float
    """Speed by the newest report; 0 while the job does not train."""


class JobGauges(Collector):
    """Facts of all jobs, by UID."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._facts: dict[str, JobFacts] = {}
        self._leads = False

    @contextmanager
    def exported(self) -> Iterator[None]:
        """Export while this replica leads; afterwards another one knows better."""
        self._leads = True
        try:
            yield
        finally:
            self._leads = False
            self._facts.clear()

    def note(self, job_uid: str, facts: JobFacts) -> None:
        """Keep what the newest look found."""
        self._facts[job_uid] = facts

    def forget(self, job_uid: str) -> None:
        """Drop a job that is gone."""
        self._facts.pop(job_uid, None)

    def collect(self) -> Iterator[Metric]:
        """Yields every family; on a replica that does not lead, without values."""
        jobs = tuple(self._facts.values())
        phases = Counter(job.phase for job in jobs)
        waiting = [job for job in jobs if not job.phase.is_terminal]
        running = [job for job in jobs if job.phase.holds_gpu]
        needy = Counter(job.needs_person for job in jobs if job.needs_person)
        ages = {
            phase: max((self._clock() - job.created for job in waiting if job.phase is phase), default=0.0)
            for phase in Phase
            if not phase.is_terminal
        }
        gpus = {
            "running": sum(job.gpus for job in running),
            "waiting": sum(job.gpus for job in waiting if job.phase.waits),
        }

        yield self._family(
            "finetune_jobs", "Jobs that exist, by phase.", "phase", {phase: phases[phase] for phase in Phase}
        )
        yield self._family(
            "finetune_jobs_waiting_for_person",
            "Jobs with which nothing goes on without a person, by reason; jobs that are over are not counted.",
            "reason",
            needy,
        )
        yield self._family(
            "finetune_oldest_job_age_seconds",
            "Time since the creation of the oldest job that is in a phase now.",
            "phase",
            ages,
        )
        yield self._family("finetune_gpus", "GPUs of the jobs that run, and of those that wait.", "state", gpus)
        yield self._family(
            "finetune_tokens_per_second",
            "Training speed of all jobs together.",
            "",
            {"": sum(job.tokens_per_second for job in running)},
        )

    def describe(self) -> Iterable[Metric]:
        """Returns the families, for the check that no name is taken twice."""
        return self.collect()

    def _family(self, name: str, text: str, label: str, values: Mapping[Any, float]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[label] if label else [])
        if self._leads:
            for value in values:
                family.add_metric([str(value)] if label else [], values[value])
        return family


JOBS = JobGauges()
REGISTRY.register(JOBS)
