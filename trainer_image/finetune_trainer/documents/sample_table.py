"""Samples as lines of JSON, and as a table for the model card."""

from collections.abc import Sequence
from pathlib import Path

from finetune_api.base import ApiModel

FILE_NAME = "samples.jsonl"
SHOWN_PROMPTS = 8
SHOWN_STEPS = 4
SHOWN_CHARACTERS = 400


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
    path = folder / FILE_NAME
    with path.open("a" if append else "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line.model_dump_json(by_alias=True, exclude_none=True) + "\n" for line in lines)
    return path


def read_samples(folder: Path) -> tuple[SampleLine, ...]:
    """What was written below `folder`, in order."""
    path = folder / FILE_NAME
    text = path.read_bytes().decode() if path.is_file() else ""
    return tuple(SampleLine.model_validate_json(line) for line in text.split("\n") if line)


def sample_table(lines: Sequence[SampleLine], exported_step: int | None = None) -> list[str]:
    """Markdown: answers by prompt, of the first step, the last one, two between and the exported one."""
    steps = {exported_step, *_some(sorted({line.step for line in lines}))}
    shown = ["## Samples", "", "Answers before and during training; all of them are in `samples.jsonl`.", ""]
    prompts = list(dict.fromkeys(line.prompt for line in lines))
    for prompt in prompts[:SHOWN_PROMPTS]:
        own = [line for line in lines if line.prompt == prompt]
        shown += [f"Prompt: {_cell(prompt)}", "", "| step | answer |", "|---|---|"]
        shown += [f"| {line.step} | {_cell(line.answer)} |" for line in own if line.step in steps]
        if own[0].reference is not None:
            shown.append(f"| data | {_cell(own[0].reference)} |")
        shown.append("")
    return shown


def _some(steps: Sequence[int]) -> set[int]:
    if len(steps) <= SHOWN_STEPS:
        return set(steps)
    return {steps[round(index * (len(steps) - 1) / (SHOWN_STEPS - 1))] for index in range(SHOWN_STEPS)}


def _cell(text: str) -> str:
    """Text on one line of a table, in which neither Markdown nor HTML means anything."""
    cut = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
    safe = "".join(f"&#{ord(sign)};" if sign in _MEANINGFUL else sign for sign in cut.strip())
    return "<br>".join(safe.splitlines()) or "(nothing)"


_MEANINGFUL = frozenset("&<>|`*_[](){}#!~\\$@:")
