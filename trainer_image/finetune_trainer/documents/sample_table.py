"""Answers to sample prompts during training, as a table in the model card."""

from collections.abc import Sequence

from finetune_trainer.training.records import SampleLine

SHOWN_PROMPTS = 8
SHOWN_STEPS = 4
SHOWN_CHARACTERS = 400


def sample_table(lines: Sequence[SampleLine], exported_step: int | None = None) -> list[str]:
    """Returns lines of Markdown: each prompt with its answers at up to four steps and at the exported one.

    The four are the first step, the last one and two between.
    """
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
    """Returns text as one cell of a table, with the characters escaped that mean something in Markdown or HTML."""
    cut = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
    safe = "".join(f"&#{ord(sign)};" if sign in _MEANINGFUL else sign for sign in cut.strip())
    return "<br>".join(safe.splitlines()) or "(nothing)"


_MEANINGFUL = frozenset("&<>|`*_[](){}#!~\\$@:")
