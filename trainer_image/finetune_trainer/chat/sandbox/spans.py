"""Where a rendered conversation has its answers: what the model is to say when it is asked, its end of turn included.

A template with {% generation %} marks says so itself. For any other, the conversation is rendered once more with
characters of Unicode's private use at the ends of every answer, which shows where its words are. In front of them
stands what the template writes when an answer is asked for (`add_generation_prompt`); behind them what it writes when
the conversation ends there. Both are learned from a rendering and recognised afterwards, so that the cost grows with
the conversation's length and not with its square. What cannot be told apart so is compared with the renderings of the
conversation up to each turn, which must be beginnings of the whole then.

TRL's training templates were tried first: they exist for some families only, supervise a piece of the header in
Qwen 2.5, DeepSeek and gpt-oss, refuse Qwen 3 in several turns, and drop tool calls where the original does.
"""

import re
from typing import Any, NamedTuple

from finetune_trainer.chat.sandbox.environment import ChatTemplate

Messages = list[dict[str, Any]]
# First characters of a mark: start and end of an answer's text, end of a called function's name. A second one numbers
# the message.
STARTS, ENDS, CALLS = "\uf8d0", "\uf8d1", "\uf8d2"
FIRST_NUMBER, NUMBERS = 0xF0000, 0xFFFD
MARK = re.compile(f"[{STARTS}{ENDS}{CALLS}][\U000f0000-\U000ffffc]")
PROBE: Messages = [{"role": "user", "content": "a"}]
TAIL_CHARACTERS = 48
PIECE_ENDS = re.compile(r"\n+|(?<=[>\]｜])(?=[<\[])")


class UnprintedAnswerError(ValueError):
    """The template leaves an answer out."""


class UnknownSpansError(ValueError):
    """The template gives no way to tell the answers apart."""


class Span(NamedTuple):
    """Characters [start, end) of the text, which answer `message` (its index)."""

    start: int
    end: int
    message: int


class AnswerFinder:
    """Finds answers in what one template prints."""

    def __init__(self, template: ChatTemplate, special_tokens: list[str]) -> None:
        self._template = template
        self._special = re.compile(
            "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True))
        )
        self._has_special = bool(special_tokens)
        self._headers: dict[tuple[str, bool], str] = {}
        self._ends: set[str] = set()

    def find(self, messages: Messages, tools: list[Any] | None) -> tuple[str, list[Span]]:
        """The text and its answers, in order. Raises UnprintedAnswerError, UnknownSpansError and whatever rendering
        raises."""
        text, marked = self._template.render_marked(messages, tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        words = self._locate_words(text, messages, tools, turns)
        if marked:
            return text, _assign(marked, turns, words)
        render = _Renderer(self._template, messages, tools)
        spans = self._recognise(text, render, turns, words) if words is not None else None
        return text, spans or self._compare_prefixes(text, render, turns)

    def _locate_words(
        self, text: str, messages: Messages, tools: list[Any] | None, turns: list[int]
    ) -> dict[int, "_Words"] | None:
        """Where each answer's words are; None where marks change what the template prints."""
        if MARK.search(text):
            return None
        for kinds in (STARTS + ENDS + CALLS, ENDS + CALLS):  # a template may look at an answer's beginning
            tagged = [_tag(message, index, kinds) for index, message in enumerate(messages)]
            printed = self._template.render(tagged, tools)
            found: dict[int, list[tuple[str, int]]] = {}
            for count, match in enumerate(MARK.finditer(printed)):
                mark = match.group()
                found.setdefault(ord(mark[1]) - FIRST_NUMBER, []).append((mark[0], match.start() - 2 * count))
            if MARK.sub("", printed) == text:
                return {index: _judge(messages[index], index, found.get(index % NUMBERS, [])) for index in turns}
        return None

    def _recognise(
        self, text: str, render: "_Renderer", turns: list[int], words: dict[int, "_Words"]
    ) -> list[Span] | None:
        spans: list[Span] = []
        for index in turns:
            floor = spans[-1].end if spans else 0
            start = self._find_start(text, render, index, floor, words[index])
            if start is None:
                return None
            spans.append(Span(start, self._find_end(text, render, index, words[index].end), index))
        return spans

    def _find_start(self, text: str, render: "_Renderer", index: int, floor: int, words: "_Words") -> int | None:
        if header := self._header(render, index).lstrip():
            at, length = self._match_header(header, text, floor, words.start)
        else:
            tail = render.upto(index)[-TAIL_CHARACTERS:] if index else ""
            at, length = text.rfind(tail, 0, words.start) if tail else -1, len(tail)
        return None if at < 0 else at + length

    def _match_header(self, header: str, text: str, floor: int, ceiling: int) -> tuple[int, int]:
        """Where the header's longest beginning stands that is there in whole pieces (special tokens, lines, tags):
        reasoning models are asked with more than their earlier turns repeat. (-1, 0) where it is not."""
        ends = {match.end() for match in PIECE_ENDS.finditer(header)} | {len(header)}
        if self._has_special:
            ends |= {match.end() for match in self._special.finditer(header)}
        for length in sorted(ends, reverse=True):
            if (at := text.rfind(header[:length], floor, ceiling)) >= 0:
                return at, length
        return -1, 0

    def _header(self, render: "_Renderer", index: int) -> str:
        """What asks for an answer here; the special token before it where the template asks with nothing."""
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
        """Behind the end of turn that follows the words."""
        for known in sorted(self._ends, key=len, reverse=True):
            if text.startswith(known, words_end):
                return words_end + len(known)
        end, is_plain = self._learn_end(text, render, index, words_end)
        if is_plain:
            self._ends.add(end)
        return words_end + len(end)

    def _learn_end(self, text: str, render: "_Renderer", index: int, words_end: int) -> tuple[str, bool]:
        """The end of turn; and whether it is the same behind other answers, too."""
        message = render.messages[index]
        tagged = _tag(message, index, ENDS + CALLS)
        header = self._header(render, index)
        following = text[words_end:]
        for asked in (True, False):
            printed = render.upto(index, tagged, add_generation_prompt=asked)
            end = _behind_words(printed)
            end = end.removesuffix(header) if asked else end[: _common_prefix(end, following)]
            if following.startswith(end) and (end or not asked):
                break
        cut = self._cut(end)
        is_plain = cut != end or bool(self._has_special and self._special.fullmatch(end))
        return cut, is_plain and not message.get("tool_calls") and message["content"] == message["content"].rstrip()

    def _cut(self, end: str) -> str:
        """Up to the last special token, if there is one: what follows it is never generated."""
        if not self._has_special:
            return end
        return end[: max((match.end() for match in self._special.finditer(end)), default=len(end))]

    def _compare_prefixes(self, text: str, render: "_Renderer", turns: list[int]) -> list[Span]:
        spans = []
        for index in turns:
            before = render.upto(index, add_generation_prompt=True)
            through = render.upto(index + 1)
            if not (text.startswith(through) and through.startswith(before)):
                if MARK.search(text):
                    raise ValueError("it has characters of Unicode's private use that mark answers here")
                raise UnknownSpansError
            answer = through[len(before) :]
            words = render.messages[index]["content"].rpartition("</think>")[2].strip()
            if words not in answer or any(name not in answer for name in _called(render.messages[index])):
                raise UnprintedAnswerError(f"messages[{index}]")
            stripped = answer.rstrip()
            ends_special = self._has_special and re.search(rf"(?:{self._special.pattern})\Z", stripped)
            end = len(stripped) if ends_special else len(answer)
            spans.append(Span(len(before), len(before) + end, index))
        return spans


class _Words(NamedTuple):
    """Where an answer's words begin (at the latest) and end in the text."""

    start: int
    end: int


class _Renderer:
    """One conversation rendered up to some turn."""

    def __init__(self, template: ChatTemplate, messages: Messages, tools: list[Any] | None) -> None:
        self._template = template
        self.messages = messages
        self.tools = tools

    def upto(self, count: int, *more: dict[str, Any], **options: Any) -> str:
        """The first `count` messages, and `more`."""
        return self._template.render([*self.messages[:count], *more], self.tools, **options)


def _tag(message: dict[str, Any], index: int, kinds: str) -> dict[str, Any]:
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


def _judge(message: dict[str, Any], index: int, found: list[tuple[str, int]]) -> _Words:
    """Where the words are; raises UnprintedAnswerError where some were not printed."""
    first: dict[str, int] = {}
    for kind, at in found:
        first.setdefault(kind, at)
    if message["content"].strip() and ENDS not in first:
        raise UnprintedAnswerError(f"the text of messages[{index}]")
    if message.get("tool_calls") and CALLS not in first:
        raise UnprintedAnswerError(f"the tool calls of messages[{index}]")
    if not first:
        raise UnprintedAnswerError(f"messages[{index}]")
    return _Words(min(first.values()), max(first.values()))


def _assign(marked: list[tuple[int, int]], turns: list[int], words: dict[int, _Words] | None) -> list[Span]:
    """Marked spans with the answer that each holds; -1 where that is not known."""
    if words is None:
        return [Span(start, end, -1) for start, end in marked]
    ends = iter([(words[index].end, index) for index in turns])
    at, index = next(ends)
    spans = []
    for start, end in marked:
        while at < start and (following := next(ends, None)) is not None:
            at, index = following
        spans.append(Span(start, end, index if start <= at <= end else -1))
    return spans


def _behind_words(printed: str) -> str:
    """What follows the last of the first mark of each kind, without marks."""
    first: dict[str, int] = {}
    for match in MARK.finditer(printed):
        first.setdefault(match.group()[0], match.end())
    return MARK.sub("", printed[max(first.values(), default=len(printed)) :])


def _called(message: dict[str, Any]) -> list[str]:
    return [call["function"]["name"] for call in message.get("tool_calls") or ()]


def _difference(shorter: str, longer: str) -> str:
    return longer[_common_prefix(shorter, longer) :]


def _common_prefix(one: str, other: str) -> int:
    """Length of the common beginning, found by halving: Python compares slices quickly, characters slowly."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
