"""What training writes down for the documents: points of the loss curve and answers to sample prompts.

Needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.base import ApiModel

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class LossPoint:
    """A logged loss, in nats per supervised token: that of training, or of an evaluation."""

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
    """Length of the answer."""
    finished: bool
    """Whether the model ended its answer, rather than maxTokens."""
    reference: str | None = None
    """How the row goes on that the prompt is from."""


def write_samples(folder: Path, lines: Sequence[SampleLine], *, append: bool = False) -> Path:
    """Write, or add to, the file below `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SAMPLES_FILE
    with path.open("a" if append else "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line.model_dump_json(by_alias=True, exclude_none=True) + "\n" for line in lines)
    return path


def read_samples(folder: Path) -> tuple[SampleLine, ...]:
    """What was written below `folder`, in order."""
    path = folder / SAMPLES_FILE
    text = path.read_bytes().decode() if path.is_file() else ""
    return tuple(SampleLine.model_validate_json(line) for line in text.split("\n") if line)
