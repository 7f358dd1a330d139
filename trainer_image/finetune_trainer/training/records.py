"""Records of a run that its documents show: points of the loss curve, and answers to sample prompts. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.base import ApiModel

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class LossPoint:
    """One logged loss, in nats per supervised token."""

    step: int
    loss: float
    is_evaluation: bool = False


class SampleLine(ApiModel):
    """One line of samples.jsonl."""

    step: int
    """Finished optimiser steps; 0 is the model before training."""
    prompt: str
    answer: str
    tokens: int
    """Length of the answer, in tokens."""
    finished: bool
    """True if the model ended its answer itself; False if maxTokens did."""
    reference: str | None = None
    """The dataset's own answer to this prompt, if the prompt is from the dataset."""


def write_samples(folder: Path, lines: Sequence[SampleLine], *, append: bool = False) -> Path:
    """Writes samples.jsonl below `folder`, or adds to it; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SAMPLES_FILE
    with path.open("a" if append else "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line.model_dump_json(by_alias=True, exclude_none=True) + "\n" for line in lines)
    return path


def read_samples(folder: Path) -> tuple[SampleLine, ...]:
    """Samples from samples.jsonl below `folder`, in order; none if there is no such file."""
    path = folder / SAMPLES_FILE
    text = path.read_bytes().decode() if path.is_file() else ""
    return tuple(SampleLine.model_validate_json(line) for line in text.split("\n") if line)
