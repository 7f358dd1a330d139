"""Marks: characters of Unicode's private use around an answer's words, which show where a template prints them."""

import re
from typing import Any, NamedTuple

from finetune_trainer.chat.sandbox.environment import ChatTemplate

Messages = list[dict[str, Any]]
# First characters of a mark: start and end of an answer's text, end of a called function's name. A second character
# numbers the message.
STARTS, ENDS, CALLS = "\uf8d0", "\uf8d1", "\uf8d2"
FIRST_NUMBER, NUMBERS = 0xF0000, 0xFFFD
MARK = re.compile(f"[{STARTS}{ENDS}{CALLS}][\U000f0000-\U000ffffc]")


class UnprintedAnswerError(ValueError):
    """An answer that the template leaves out; the message names it."""


class Words(NamedTuple):
    """An answer's words: the latest position at which they begin, and that of their end."""

    start: int
    end: int


def locate_words(
    text: str, template: ChatTemplate, messages: Messages, tools: list[Any] | None
) -> dict[int, Words] | None:
    """The place in `text` of each answer's words, by the message's index.

    None if the template prints something else for a conversation with marks. Raises UnprintedAnswerError, and
    whatever rendering raises.
    """
    if MARK.search(text):
        return None

    # A template may look at an answer's beginning, so marks at the ends alone are tried, too.
    for kinds in (STARTS + ENDS + CALLS, ENDS + CALLS):
        tagged = [tag(message, index, kinds) for index, message in enumerate(messages)]
        printed = template.render(tagged, tools)

        found: dict[int, list[tuple[str, int]]] = {}
        for count, match in enumerate(MARK.finditer(printed)):
            mark = match.group()
            found.setdefault(ord(mark[1]) - FIRST_NUMBER, []).append((mark[0], match.start() - 2 * count))

        if MARK.sub("", printed) == text:
            return {
                index: _place_words(message, index, found.get(index % NUMBERS, []))
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
    if core := content.strip():
        at = content.index(core)
        start = STARTS + number if STARTS in kinds else ""
        tagged["content"] = content[:at] + start + core + ENDS + number + content[at + len(core) :]

    if calls := message.get("tool_calls"):
        last = calls[-1]["function"]
        function = last | {"name": last["name"] + CALLS + number}
        tagged["tool_calls"] = [*calls[:-1], calls[-1] | {"function": function}]
    return tagged


def _place_words(message: dict[str, Any], index: int, found: list[tuple[str, int]]) -> Words:
    """The place of an answer's words by its marks. Raises UnprintedAnswerError if some were not printed."""
    first: dict[str, int] = {}
    for kind, at in found:
        first.setdefault(kind, at)

    if message["content"].strip() and ENDS not in first:
        raise UnprintedAnswerError(f"the text of messages[{index}]")
    if message.get("tool_calls") and CALLS not in first:
        raise UnprintedAnswerError(f"the tool calls of messages[{index}]")
    if not first:
        raise UnprintedAnswerError(f"messages[{index}]")
    return Words(min(first.values()), max(first.values()))


def behind_words(printed: str) -> str:
    """The text, without marks, behind the last of the marks; of each kind only the first mark counts."""
    first: dict[str, int] = {}
    for match in MARK.finditer(printed):
        first.setdefault(match.group()[0], match.end())
    return MARK.sub("", printed[max(first.values(), default=len(printed)) :])
