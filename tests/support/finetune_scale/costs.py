"""Measures what the operator costs: its requests, as the API server counts them, its memory and its processor time."""

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from finetune_scale.api import Api

RESOURCES = {"finetunejobs", "jobs", "configmaps", "pods", "events", "tokenreviews", "leases"}
COUNT = re.compile(r"^apiserver_request_total\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
OPERATOR = "finetune-operator"


@dataclass(frozen=True)
class Requests:
    """Requests so far. All are the operator's, apart from what the run itself does: it watches, and creates jobs."""

    reads: int
    writes: int
    """Of FineTuneJobs' status, Jobs, ConfigMaps and Events."""

    reviews: int
    """TokenReviews."""

    @classmethod
    async def count(cls, api: Api) -> Self:
        """Ask the API server."""
        reads = writes = reviews = 0
        for line in COUNT.finditer(await api.text("/metrics")):
            labels = dict(LABEL.findall(line[1]))
            resource, number = labels["resource"], int(float(line[2]))
            if resource not in RESOURCES:
                continue
            what = (resource, labels["subresource"], labels["verb"])
            reads += number if labels["verb"] in ("GET", "LIST") and resource not in ("leases", "tokenreviews") else 0
            writes += number if what in _WRITES else 0
            reviews += number if what == ("tokenreviews", "", "POST") else 0
        return cls(reads, writes + await _events(api), reviews)

    def since(self, before: Self) -> "Requests":
        """Return the requests since an earlier count."""
        return Requests(self.reads - before.reads, self.writes - before.writes, self.reviews - before.reviews)


_WRITES = {
    ("finetunejobs", "status", "APPLY"),
    ("jobs", "", "POST"),
    ("jobs", "", "PATCH"),
    ("jobs", "", "APPLY"),
    ("configmaps", "", "PATCH"),
}


async def _events(api: Api) -> int:
    """Events that the operator posted. The Job controller posts some as well, and a counter does not tell whose."""
    total = 0
    more = ""
    while True:
        query = f"?limit=2000&continue={more}" if more else "?limit=2000"
        page = await api.request("GET", f"/api/v1/events{query}")
        total += sum(1 for event in page["items"] if event.get("reportingComponent") == OPERATOR)
        more = page["metadata"].get("continue", "")
        if not more:
            return total


class ProcessWatch:
    """Largest resident memory of a process, in bytes, and its processor seconds."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self.max_rss = 0

    async def watch(self) -> None:
        """Look once a second until cancelled."""
        while True:
            self.max_rss = max(self.max_rss, self.rss)
            await asyncio.sleep(1)

    @property
    def rss(self) -> int:
        """Resident bytes now."""
        pages = int((self._folder / "statm").read_text().split()[1])
        return pages * int(os.sysconf("SC_PAGE_SIZE"))

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds so far, of all threads."""
        fields = (self._folder / "stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))
