"""Reasoning of answers: where it stands in a message, and what became of it in the text that a template printed. Pure.

Data sets write it in front of an answer's text, as <think>...</think>, or under a key of its own. Templates parse the
first, know some of the keys, and print reasoning for some turns only; others put a <think> of their own before it.
"""

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that data sets and templates use for a message's reasoning; templates are given the first two."""

OPENING = re.compile(r"\s*<(think|thinking|thought|reasoning)>\s*")
CLOSING = re.compile(r"</(?:think|thinking|thought|reasoning)>")
REPEATED = re.compile(r"<(think|thinking|thought|reasoning)>\s*(?:</\1>\s*)?<\1>\s*")
NEAR_CHARACTERS = 80
"""Characters before reasoning in which another opening tag stands, if a template wrote one."""


class Fate(StrEnum):
    """The ways in which a template prints an answer's reasoning."""

    PRINTED = "printed"
    LEFT_OUT = "left out"
    DOUBLED = "doubled"


def inline_reasoning(content: str) -> tuple[int, int, int] | None:
    """Start and end of the reasoning within an answer's text, and where the text behind it begins; None without any."""
    if "<" not in content:
        return None

    opening = OPENING.match(content)
    start = opening.end() if opening else 0
    closings = list(CLOSING.finditer(content, start))
    if closings:
        return start, closings[-1].start(), closings[-1].end()
    return (start, len(content), len(content)) if opening else None


def may_have_reasoning(message: dict[str, Any]) -> bool:
    """False for an answer without a tag and without a key of reasoning: most answers, seen at a glance."""
    return "<" in message["content"] or any(name in message for name in REASONING)


def has_reasoning(message: dict[str, Any]) -> bool:
    """True for an answer with reasoning that is more than white space, in its text or under a key."""
    return message["role"] == "assistant" and bool(reasoning_texts(message))


def reasoning_texts(message: dict[str, Any]) -> list[str]:
    """The reasoning of a message, wherever it stands, without white space around it."""
    texts = [message[name].strip() for name in REASONING if isinstance(message.get(name), str)]
    if (found := inline_reasoning(message["content"])) is not None:
        texts.append(message["content"][found[0] : found[1]].strip())
    return [text for text in texts if text]


def is_only_reasoning(content: str) -> bool:
    """True for a text with nothing behind its reasoning."""
    found = inline_reasoning(content)
    return found is not None and not content[found[2] :].strip()


def judge_reasoning(text: str, message: dict[str, Any], places: Sequence[int] | None, start: int | None) -> Fate | None:
    """The fate of an answer's reasoning in `text`; None for an answer without reasoning that is printed once.

    `places` are the positions at which it was printed, None if they are unknown; `start` is that of the answer's text.
    """
    texts = reasoning_texts(message)
    if places is None:
        return None if not texts else Fate.PRINTED if texts[-1] in text else Fate.LEFT_OUT

    if len(places) > 1 or any(_repeats_tag(text, at) for at in (*places, *([] if start is None else [start]))):
        return Fate.DOUBLED
    if not texts:
        return None
    return Fate.PRINTED if places else Fate.LEFT_OUT


def _repeats_tag(text: str, at: int) -> bool:
    """True if the opening tag around this position stands behind another one."""
    found = REPEATED.finditer(text, max(0, at - NEAR_CHARACTERS), at + NEAR_CHARACTERS)
    return any(match.start() < at <= match.end() for match in found)
