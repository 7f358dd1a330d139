"""One job as a row. A row reads the plain JSON: a client older than its cluster shows what it knows."""

from dataclasses import dataclass, replace
from typing import Self

from finetune_api.base import Json
from finetune_api.vocabulary import Phase
from finetune_client.terminal.text import age, find, number, word

ON_GPU = frozenset(phase.value for phase in Phase if phase.holds_gpu)
WAITING = frozenset({"", *(phase.value for phase in Phase if phase.waits)})  # a new job has no phase yet
ENDED = frozenset(phase.value for phase in Phase if phase.is_terminal)
STYLES = {"Succeeded": "green", "Failed": "red", "Suspended": "yellow", "Cancelling": "yellow"}
"""Colours of phases; any other is cyan while it holds a GPU, and dim while it waits."""

_NAME, _TEXT = 253, 320


@dataclass(frozen=True)
class Row:
    """A job's name, its place and how far it is; every text is cleaned for a terminal."""

    namespace: str
    name: str
    uid: str
    phase: str
    reason: str
    message: str
    percent: int
    step: int | None
    steps: int | None
    loss: float | None
    eta: str
    age: str
    model: str
    gpus: int
    gpu_resource: str
    queue: str
    retries: int

    @classmethod
    def of(cls, job: Json) -> Self:
        """Read the row of a job."""
        progress = find(job, "status", "progress")
        step, steps = number(progress, "step"), number(progress, "totalSteps")
        gpus, nodes = (number(job, "spec", "resources", name) for name in ("gpus", "nodes"))

        return cls(
            namespace=word(job, "metadata", "namespace", limit=_NAME),
            name=word(job, "metadata", "name", limit=_NAME),
            uid=word(job, "metadata", "uid", limit=_NAME),
            phase=word(job, "status", "phase", limit=32),
            reason=word(job, "status", "reason", limit=64),
            message=_message(job),
            percent=max(0, min(100, int(number(progress, "percent") or 0))),
            step=None if step is None else int(step),
            steps=None if steps is None else int(steps),
            loss=number(progress, "loss"),
            eta=""
            if (eta := word(progress, "eta", limit=32)) == "0s"
            else eta,  # training is over, and the rest unknown
            age=age(word(job, "metadata", "creationTimestamp", limit=64)),
            model=word(job, "spec", "model", "source", limit=_NAME),
            gpus=(1 if gpus is None else int(gpus)) * int(nodes or 1),
            gpu_resource=word(job, "spec", "resources", "gpuResourceName", limit=_NAME) or "nvidia.com/gpu",
            queue=word(job, "spec", "scheduling", "queueName", limit=_NAME),
            retries=int(number(job, "status", "retries") or 0),
        )

    def without_age(self) -> Self:
        """Return the row without its age, which changes though nothing happens."""
        return replace(self, age="")

    @property
    def style(self) -> str:
        """Colour of the phase."""
        return STYLES.get(self.phase, "cyan" if self.phase in ON_GPU else "dim")

    @property
    def steps_text(self) -> str:
        """Finished steps of all, such as 40/200."""
        return "" if self.step is None else f"{self.step:,}" + (f"/{self.steps:,}" if self.steps else "")

    @property
    def loss_text(self) -> str:
        """The newest training loss with four digits."""
        return "" if self.loss is None else f"{self.loss:.4f}"


def _time_left(progress: Json | None) -> str:
    """Read the estimate; that of a training which is over says nothing about export and upload."""
    eta = word(progress, "eta", limit=32)
    return "" if eta == "0s" else eta


def _message(job: Json) -> str:
    """Read the failure's message, or that of condition Ready."""
    if failure := word(job, "status", "failure", "message", limit=_TEXT):
        return failure
    conditions = find(job, "status", "conditions")
    ready = (each for each in conditions or () if isinstance(each, dict) and each.get("type") == "Ready")
    return word(next(ready, None), "message", limit=_TEXT)


def sorted_rows(jobs: list[Json]) -> list[Row]:
    """Return the rows by namespace and name."""
    return sorted(map(Row.of, jobs), key=lambda row: (row.namespace, row.name))
