"""Finds the answers in a rendered conversation: what the model is to say when it is asked, its end of turn included.

A template with {% generation %} marks says so itself. For any other, the answers are found in three steps:

1. The conversation is rendered once more, with characters of Unicode's private use at the ends of every answer. This
   shows where the answer's words are.
2. In front of the words stands the header: what the template writes when an answer is asked for
   (`add_generation_prompt`).
3. Behind the words stands the end of turn: what it writes when the conversation ends there.

Header and end are learned from one rendering and recognised afterwards, so that the cost grows with the conversation's
length and not with its square. Where this fails, the conversation is compared with the renderings of its beginnings up
to each turn, which must be beginnings of the whole text then.

TRL's training templates were tried first: they exist for some families only, supervise a piece of the header in
Qwen 2.5, DeepSeek and gpt-oss, refuse Qwen 3 in several turns, and drop tool calls where the original does.
"""

import re
from typing import Any, NamedTuple

from finetune_trainer.chat.sandbox.environment import ChatTemplate
from finetune_trainer.chat.sandbox.marks import (
    CALLS,
    ENDS,
    MARK,
    Messages,
    UnprintedAnswerError,
    Words,
    behind_words,
    locate_words,
    tag,
)
from finetune_trainer.chat.sandbox.reasoning import Fate, judge_reasoning, may_have_reasoning

PROBE: Messages = [{"role": "user", "content": "a"}]
TAIL_CHARACTERS = 48
PIECE_ENDS = re.compile(r"\n+|(?<=[>\]｜])(?=[<\[])")


class UnknownSpansError(ValueError):
    """A template that gives no way to tell the answers apart."""


class AnswerSpan(NamedTuple):
    """Characters [start, end) of the text, which answer `message` (its index; -1 if unknown)."""

    start: int
    end: int
    message: int


class FoundAnswers(NamedTuple):
    """A rendered conversation."""

    text: str
    spans: list[AnswerSpan]
    reasoning: dict[int, Fate]
    """What became of the reasoning of answers that have some, by message."""


class AnswerFinder:
    """Finds answers in the texts that one template prints."""

    def __init__(self, template: ChatTemplate, special_tokens: list[str]) -> None:
        self._template = template
        self._special = re.compile(
            "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True))
        )
        self._has_special = bool(special_tokens)

        # What was learned: headers by the role before the answer and whether there are tools, and ends of turns.
        self._headers: dict[tuple[str, bool], str] = {}
        self._ends: set[str] = set()

    def find(self, messages: Messages, tools: list[Any] | None, *, spans: bool = True) -> FoundAnswers:
        """The text, its answers in order unless `spans` is False, and what became of their reasoning.

        Raises UnprintedAnswerError, UnknownSpansError and whatever rendering raises.
        """
        text, marked = self._template.render_marked(messages, tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            words = locate_words(text, self._template, messages, tools)
        except UnprintedAnswerError:
            if spans:
                raise
            words = None

        fates = _judge_reasoning(text, messages, turns, words)
        if not spans:
            return FoundAnswers(text, [], fates)
        if marked:
            return FoundAnswers(text, _assign(self._without_space(text, marked), turns, words), fates)

        render = _Renderer(self._template, messages, tools)
        found = self._recognise(text, render, turns, words) if words is not None else None
        return FoundAnswers(text, found or self._compare_prefixes(text, render, turns), fates)

    def _without_space(self, text: str, marked: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Marked places without white space behind a special token, which is never generated."""
        return [(start, start + self._generated_length(text[start:end])) for start, end in marked]

    def _generated_length(self, answer: str) -> int:
        """The answer's length without white space behind a special token that ends it."""
        stripped = answer.rstrip()
        ends_special = self._has_special and re.search(rf"(?:{self._special.pattern})\Z", stripped)
        return len(stripped) if ends_special else len(answer)

    def _recognise(
        self, text: str, render: "_Renderer", turns: list[int], words: dict[int, Words]
    ) -> list[AnswerSpan] | None:
        """The answers by their headers and ends; None if a header is not where it should be."""
        spans: list[AnswerSpan] = []
        for index in turns:
            floor = spans[-1].end if spans else 0
            start = self._find_start(text, render, index, floor, words[index])
            if start is None:
                return None
            spans.append(AnswerSpan(start, self._find_end(text, render, index, words[index].end), index))
        return spans

    def _find_start(self, text: str, render: "_Renderer", index: int, floor: int, words: Words) -> int | None:
        """The position behind the header of an answer, not before `floor`."""
        if header := self._header(render, index).lstrip():
            at, length = self._match_header(header, text, floor, words.start)
        else:
            # Without a header the answer follows the turn before it at once.
            tail = render.upto(index)[-TAIL_CHARACTERS:] if index else ""
            at, length = text.rfind(tail, 0, words.start) if tail else -1, len(tail)
        return None if at < 0 else at + length

    def _match_header(self, header: str, text: str, floor: int, ceiling: int) -> tuple[int, int]:
        """Position and length of the longest beginning of the header in text[floor:ceiling]; (-1, 0) if there is none.

        A beginning consists of whole pieces: special tokens, lines, tags. Reasoning models are asked with more than
        their earlier turns repeat.
        """
        ends = {match.end() for match in PIECE_ENDS.finditer(header)} | {len(header)}
        if self._has_special:
            ends |= {match.end() for match in self._special.finditer(header)}

        for length in sorted(ends, reverse=True):
            if (at := text.rfind(header[:length], floor, ceiling)) >= 0:
                return at, length
        return -1, 0

    def _header(self, render: "_Renderer", index: int) -> str:
        """The text that asks for answer `index`; the special token before it if the template asks with nothing."""
        role = render.messages[index - 1]["role"] if index else ""
        key = (role, bool(render.tools))
        if key not in self._headers:
            asker = render if index else _Renderer(self._template, PROBE, render.tools)
            bare = asker.upto(index or 1)
            header = _difference(bare, asker.upto(index or 1, add_generation_prompt=True))
            if not header.strip() and self._has_special:
                last = re.search(rf"(?:{self._special.pattern})\s*\Z", bare)
                header = last.group().rstrip() if last else ""
            self._headers[key] = header
        return self._headers[key]

    def _find_end(self, text: str, render: "_Renderer", index: int, words_end: int) -> int:
        """The position behind the end of turn that follows the words."""
        for known in sorted(self._ends, key=len, reverse=True):
            if text.startswith(known, words_end):
                return words_end + len(known)

        end, is_plain = self._learn_end(text, render, index, words_end)
        if is_plain:
            self._ends.add(end)
        return words_end + len(end)

    def _learn_end(self, text: str, render: "_Renderer", index: int, words_end: int) -> tuple[str, bool]:
        """The end of turn; and True if other answers end the same way, so that it can be remembered."""
        message = render.messages[index]
        tagged = tag(message, index, ENDS + CALLS)
        header = self._header(render, index)
        following = text[words_end:]

        # The end of a conversation that asks on, without the header that asks; else of one that just ends.
        for asked in (True, False):
            printed = render.upto(index, tagged, add_generation_prompt=asked)
            end = behind_words(printed)
            end = end.removesuffix(header) if asked else end[: _common_prefix(end, following)]
            if following.startswith(end) and (end or not asked):
                break

        shortened = self._through_last_special(end)
        is_plain = shortened != end or bool(self._has_special and self._special.fullmatch(end))
        has_plain_text = not message.get("tool_calls") and message["content"] == message["content"].rstrip()
        return shortened, is_plain and has_plain_text

    def _through_last_special(self, end: str) -> str:
        """The end of turn up to its last special token, if it has one: what follows is never generated."""
        if not self._has_special:
            return end
        return end[: max((match.end() for match in self._special.finditer(end)), default=len(end))]

    def _compare_prefixes(self, text: str, render: "_Renderer", turns: list[int]) -> list[AnswerSpan]:
        """The answers by renderings up to each turn. Raises UnknownSpansError if the text does not begin so."""
        spans = []
        for index in turns:
            before = render.upto(index, add_generation_prompt=True)
            through = render.upto(index + 1)
            if not (text.startswith(through) and through.startswith(before)):
                if MARK.search(text):
                    raise ValueError(
                        "the row contains characters of Unicode's private use (U+F8D0 to U+F8D4) that are needed here "
                        "to mark answers: remove them"
                    )
                raise UnknownSpansError

            answer = through[len(before) :]
            words = render.messages[index]["content"].rpartition("</think>")[2].strip()
            if words not in answer or any(name not in answer for name in _called(render.messages[index])):
                raise UnprintedAnswerError(f"messages[{index}]")

            spans.append(AnswerSpan(len(before), len(before) + self._generated_length(answer), index))
        return spans


class _Renderer:
    """One conversation, rendered up to some turn."""

    def __init__(self, template: ChatTemplate, messages: Messages, tools: list[Any] | None) -> None:
        self._template = template
        self.messages = messages
        self.tools = tools

    def upto(self, count: int, *more: dict[str, Any], **options: Any) -> str:
        """The text of the first `count` messages, and of `more`."""
        return self._template.render([*self.messages[:count], *more], self.tools, **options)


def _judge_reasoning(
    text: str, messages: Messages, turns: list[int], words: dict[int, Words] | None
) -> dict[int, Fate]:
    """The fate of the reasoning of each answer that has some."""
    fates = {}
    for index in turns:
        if not may_have_reasoning(messages[index]):
            continue
        placed = words[index] if words is not None else Words(0, 0)
        if (fate := judge_reasoning(text, messages[index], placed.reasoning, placed.text)) is not None:
            fates[index] = fate
    return fates


def _assign(marked: list[tuple[int, int]], turns: list[int], words: dict[int, Words] | None) -> list[AnswerSpan]:
    """The marked spans, each with the answer that it holds; -1 if that is not known."""
    if words is None:
        return [AnswerSpan(start, end, -1) for start, end in marked]

    ends = iter([(words[index].end, index) for index in turns])
    at, index = next(ends)
    spans = []
    for start, end in marked:
        while at < start and (following := next(ends, None)) is not None:
            at, index = following
        spans.append(AnswerSpan(start, end, index if start <= at <= end else -1))
    return spans


def _called(message: dict[str, Any]) -> list[str]:
    """Names of the functions that a message calls."""
    return [call["function"]["name"] for call in message.get("tool_calls") or ()]


def _difference(shorter: str, longer: str) -> str:
    """The rest of the longer text behind the common beginning."""
    return longer[_common_prefix(shorter, longer) :]


def _common_prefix(one: str, other: str) -> int:
    """Length of the common beginning, found by halving: Python compares slices quickly, characters slowly."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
