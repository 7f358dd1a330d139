"""Control tokens, such as the end of a turn, that a row's own text spells out.

A tokenizer takes such text for the token itself, so a row could end its turn and speak as someone else (data poisoning
that no template prevents). Only the chat template may write control tokens. Before a row is rendered, every one that
its texts hold is hidden behind two characters of Unicode's private use; in what was printed it is shown again, and the
text between the template's own control tokens around it is encoded as plain text. Whether a part encoded alone gives
the same tokens as within the whole is tried on the part with letters in the place of what was hidden; where it does
not, the row is refused. Rows without such text are encoded as ever.

A row of plain text, and a prompt and completion without a chat template, are written by whoever made the row, control
tokens included: they keep them. Tokens that a tokenizer adds without making them special (<think>, <tool_call>) are
words of the text everywhere.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from finetune_trainer.chat.templates import SPECIAL_TOKENS, TOOL_TOKENS
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.strict_json import excerpt

HIDDEN = "\uf8d8"  # in front of a character that says which token; `rendering.spans` has U+F8D0 to U+F8D2
FIRST_NUMBER, NUMBERS = 0xF0000, 0xFFFD
HIDDEN_TOKEN = re.compile(f"{HIDDEN}([\U000f0000-\U000ffffc])")
Span = tuple[int, int, int]
Place = tuple[int, int]


class Shown(NamedTuple):
    """What the template printed, with the row's control tokens as text again."""

    text: str
    spans: list[Span]
    row_tokens: list[Place]
    """Characters [start, end) of each control token that is the row's, in order."""


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        known = {token for tokens in (*SPECIAL_TOKENS.values(), *TOOL_TOKENS.values()) for token in tokens} | set(
            tokenizer.all_special_tokens
        )
        added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()
                 if token.special or str(token) in known}  # fmt: skip
        self._ids = frozenset(added.values())
        self._names = sorted(set(added) - {""}, key=len, reverse=True)[:NUMBERS]
        self._numbers = {name: chr(FIRST_NUMBER + index) for index, name in enumerate(self._names)}
        self._firsts = {name[0] for name in self._names}
        self._pattern = re.compile("|".join(map(re.escape, self._names))) if self._names else None

    def __contains__(self, token: int) -> bool:
        """Whether a token id is that of a control token."""
        return token in self._ids

    def find(self, value: Any) -> str | None:
        """The first control token that a text holds, or a text anywhere in a list or object."""
        if isinstance(value, str):
            for first in self._firsts:  # six times as fast as a pattern of tokens that begin differently
                if first in value and self._pattern is not None:
                    match = self._pattern.search(value)
                    return match.group() if match is not None else None
            return None
        entries = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        return next((found for entry in entries if (found := self.find(entry)) is not None), None)

    def hide(self, value: Any) -> Any:
        """The value with its control tokens hidden. Raises BadRowError where it has characters that hide them."""
        if isinstance(value, str) and self._pattern is not None:
            if HIDDEN in value:
                raise BadRowError(f"it has U+{ord(HIDDEN):04X}, of Unicode's private use, beside control tokens")
            return self._pattern.sub(lambda found: HIDDEN + self._numbers[found.group()], value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(entry) for key, entry in value.items()}
        return [self.hide(entry) for entry in value] if isinstance(value, list) else value

    def show(self, text: str, spans: list[Span]) -> Shown:
        """The text and its spans with what was hidden. Raises BadRowError where the template changed it."""
        parts: list[str] = []
        places: list[Place] = []
        ends, shifts, at, shift = [0], [0], 0, 0
        for found in HIDDEN_TOKEN.finditer(text):
            name = self._names[ord(found.group(1)) - FIRST_NUMBER]
            parts += (text[at : found.start()], name)
            places.append((found.start() + shift, found.start() + shift + len(name)))
            at = found.end()
            shift += len(name) - len(found.group())
            ends.append(at)
            shifts.append(shift)
        shown = "".join([*parts, text[at:]])
        if HIDDEN in shown or f"\\u{ord(HIDDEN):04x}" in shown.lower():
            raise BadRowError("the chat template takes apart the control tokens that the row spells out")

        def move(place: int) -> int:
            return place + shifts[bisect_right(ends, place) - 1]

        return Shown(shown, [(move(start), move(end), message) for start, end, message in spans], places)

    def encode(self, text: str, row_tokens: list[Place]) -> tuple[list[int], list[Place]]:
        """Token ids of a rendered text, with the characters that each stands for; the row's control tokens are plain
        text. Raises BadRowError where the tokenizer cannot do that."""
        plain = _with_letters(text, row_tokens)
        ids, places = self._tokens(plain, split=False)
        if not row_tokens:
            return ids, places
        whole_ids: list[int] = []
        whole_places: list[Place] = []
        starts = [start for start, _ in row_tokens]
        for first, last, start, end in self._sections(ids, places, len(text)):
            between = starts[bisect_right(starts, start - 1) : bisect_right(starts, end - 1)]
            found = ids[first:last], places[first:last]
            if between:
                found = self._encode_part(text, plain, start, end, ids[first:last])
            whole_ids += [*found[0], *ids[last : last + 1]]
            whole_places += [*found[1], *places[last : last + 1]]
        return whole_ids, whole_places

    def _sections(self, ids: list[int], places: list[Place], length: int) -> Iterator[tuple[int, int, int, int]]:
        """Tokens [first, last) and characters [start, end) between one control token and the next."""
        first = start = 0
        for index, token in enumerate(ids):
            if token in self._ids:
                yield first, index, start, places[index][0]
                first, start = index + 1, places[index][1]
        yield first, len(ids), start, length

    def _encode_part(
        self, text: str, plain: str, start: int, end: int, expected: list[int]
    ) -> tuple[list[int], list[Place]]:
        for prefixes in ("as the tokenizer does", "never"):
            with _prefixes(self._tokenizer, prefixes):
                if self._tokens(plain[start:end], split=True)[0] != expected:
                    continue
                ids, places = self._tokens(text[start:end], split=True)
            if not self._ids.intersection(ids):
                return ids, [(begin + start, finish + start) for begin, finish in places]
        found = excerpt(self.find(text[start:end]))
        raise BadRowError(f"its text spells out a control token, which this tokenizer cannot take as text: {found}")

    def _tokens(self, text: str, *, split: bool) -> tuple[list[int], list[Place]]:
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=split)
        return found["input_ids"], found["offset_mapping"]


def _with_letters(text: str, places: Iterable[Place]) -> str:
    """The text with letters, as many, where the row's control tokens are."""
    parts: list[str] = []
    at = 0
    for start, end in places:
        parts += (text[at:start], "x" * (end - start))
        at = end
    return "".join([*parts, text[at:]])


@contextmanager
def _prefixes(tokenizer: Any, scheme: str) -> Iterator[None]:
    """Let SentencePiece's mark of a word not be put in front of a text that is a part of one."""
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    before = getattr(splitter, "prepend_scheme", None)
    if scheme != "never" or before is None:
        yield
        return
    splitter.prepend_scheme = scheme
    try:
        yield
    finally:
        splitter.prepend_scheme = before
