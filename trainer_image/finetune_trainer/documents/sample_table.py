"""Samples as lines of JSON, and as a table for the model card."""

from collections.abc import Sequence

from finetune_trainer.training.records import SampleLine

SHOWN_PROMPTS = 8
SHOWN_STEPS = 4
SHOWN_CHARACTERS = 400


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
