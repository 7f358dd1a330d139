"""Marks: characters of Unicode's private use around an answer's words, which show where a template prints them."""

import re
from typing import Any, NamedTuple

from finetune_trainer.chat.sandbox.environment import ChatTemplate
from finetune_trainer.chat.sandbox.reasoning import (
    OPENING,
    REASONING,
    inline_reasoning,
    is_only_reasoning,
    may_have_reasoning,
)

Messages = list[dict[str, Any]]
# First characters of a mark: start and end of an answer's text, end of its last call's name, start of reasoning, end
# of the first name of several calls. A second character numbers the message.
STARTS, ENDS, CALLS, REASONS, FIRST_CALLS = "\uf8d0", "\uf8d1", "\uf8d2", "\uf8d3", "\uf8d4"
FIRST_NUMBER, NUMBERS = 0xF0000, 0xFFFD
MARK = re.compile(f"[{STARTS}-{FIRST_CALLS}][\U000f0000-\U000ffffc]")

# A template may look at the beginning of an answer, or of its reasoning, so fewer marks are tried after more.
ATTEMPTS = (STARTS + ENDS + CALLS, ENDS + CALLS)
ATTEMPTS_WITH_REASONING = (STARTS + ENDS + CALLS + REASONS, ENDS + CALLS + REASONS, ENDS + CALLS)


class UnprintedAnswerError(ValueError):
    """An answer that the template leaves out; the message names it."""


class Words(NamedTuple):
    """An answer's words: the latest position at which they begin, reasoning included, and that of their end."""

    start: int
    end: int

    text: int | None = None
    """Start of the answer's text; None if unknown."""

    reasoning: tuple[int, ...] | None = None
    """Positions at which its reasoning begins, several if it was printed several times; None if unknown."""


def locate_words(
    text: str, template: ChatTemplate, messages: Messages, tools: list[Any] | None
) -> dict[int, Words] | None:
    """The place in `text` of each answer's words, by the message's index.

    None if the template prints something else for a conversation with marks. Raises UnprintedAnswerError, and
    whatever rendering raises.
    """
    if MARK.search(text):
        return None

    answers = [message for message in messages if message["role"] == "assistant"]
    has_some = any(map(may_have_reasoning, answers))
    for kinds in ATTEMPTS_WITH_REASONING if has_some else ATTEMPTS:
        tagged = [tag(message, index, kinds) for index, message in enumerate(messages)]
        printed = template.render(tagged, tools)

        found: dict[int, list[tuple[str, int]]] = {}
        for count, match in enumerate(MARK.finditer(printed)):
            mark = match.group()
            found.setdefault(ord(mark[1]) - FIRST_NUMBER, []).append((mark[0], match.start() - 2 * count))

        if MARK.sub("", printed) == text:
            return {
                index: _place_words(message, index, found.get(index % NUMBERS, []), text, REASONS in kinds)
                for index, message in enumerate(messages)
                if message["role"] == "assistant"
            }
    return None


def tag(message: dict[str, Any], index: int, kinds: str) -> dict[str, Any]:
    """The message with marks around its words, inside the white space that templates trim."""
    if message["role"] != "assistant":
        return message

    number = chr(FIRST_NUMBER + index % NUMBERS)
    content, tagged = message["content"], dict(message)
    if REASONS in kinds:
        content = _tag_reasoning(tagged, REASONS + number)
    if core := content.strip():
        at = content.index(core)
        start = STARTS + number if STARTS in kinds else ""
        tagged["content"] = content[:at] + start + core + ENDS + number + content[at + len(core) :]

    if calls := message.get("tool_calls"):
        first = [_tag_name(calls[0], FIRST_CALLS + number)] if len(calls) > 1 else []
        tagged["tool_calls"] = [*first, *calls[len(first) : -1], _tag_name(calls[-1], CALLS + number)]
    return tagged


def _tag_name(call: dict[str, Any], mark: str) -> dict[str, Any]:
    """The call with the mark behind the function's name."""
    function = call["function"]
    return call | {"function": function | {"name": function["name"] + mark}}


def _tag_reasoning(message: dict[str, Any], mark: str) -> str:
    """Puts the mark in front of reasoning under a key; returns the content with the mark in front of reasoning there.

    Each stands behind an opening tag: templates look for tags. Empty reasoning has no mark, as it may be left out.
    """
    for name in REASONING:
        if isinstance(text := message.get(name), str) and text.strip():
            opening = OPENING.match(text)
            at = opening.end() if opening else len(text) - len(text.lstrip())
            message[name] = text[:at] + mark + text[at:]

    content: str = message["content"]
    found = inline_reasoning(content)
    if found is None or not content[found[0] : found[1]].strip():
        return content
    return content[: found[0]] + mark + content[found[0] :]


def _place_words(
    message: dict[str, Any], index: int, found: list[tuple[str, int]], text: str, sees_reasoning: bool
) -> Words:
    """The place of an answer's words by its marks. Raises UnprintedAnswerError if some were not printed."""
    first: dict[str, int] = {}
    for kind, at in found:
        first.setdefault(kind, at)

    # The mark at the end of a text that is reasoning only may be printed without the reasoning.
    reasoning = tuple(at for kind, at in found if kind == REASONS)
    has_lost_text = sees_reasoning and not reasoning and is_only_reasoning(message["content"])
    if message["content"].strip() and (ENDS not in first or has_lost_text):
        raise UnprintedAnswerError(f"the text of messages[{index}]")
    if message.get("tool_calls") and CALLS not in first:
        raise UnprintedAnswerError(f"the tool calls of messages[{index}]")
    if first.keys() <= {REASONS, FIRST_CALLS}:
        raise UnprintedAnswerError(f"messages[{index}]")

    # A template may ask with the opening tag that the answer's text begins with.
    start = min(first.values())
    opening = OPENING.match(text, start) if start == first.get(STARTS) else None
    ends = [at for kind, at in first.items() if kind not in (REASONS, FIRST_CALLS)]
    return Words(
        opening.end() if opening else start, max(ends), first.get(STARTS), reasoning if sees_reasoning else None
    )


def behind_words(printed: str) -> str:
    """The text, without marks, behind the last of the marks; of each kind only the first mark counts."""
    first: dict[str, int] = {}
    for match in MARK.finditer(printed):
        if match.group()[0] != FIRST_CALLS:
            first.setdefault(match.group()[0], match.end())
    return MARK.sub("", printed[max(first.values(), default=len(printed)) :])
