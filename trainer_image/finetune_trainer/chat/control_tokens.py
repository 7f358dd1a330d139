"""Keeps control tokens, such as the end of a turn, that a row contains as text from becoming tokens.

A tokenizer takes such text for the token itself, so a row could end its turn and speak as someone else (data poisoning
that no template prevents). Only the chat template may write control tokens:

1. Before a row is rendered, each control token in its texts is replaced by two characters of Unicode's private use.
2. In the rendered text they are put back, and their places are remembered.
3. The text between the template's own control tokens is encoded as plain text wherever it contains one of the row's.

A part encoded alone must give the same tokens as within the whole text. This is tried on the part with letters in place
of its control tokens; where it fails, the row is refused. Rows without such text are encoded in one go.

A row of plain text, and a prompt and completion without a chat template, keep the control tokens that their author
wrote. Tokens that a tokenizer adds without making them special (<think>, <tool_call>) are ordinary words everywhere.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from finetune_trainer.chat.labels import CharacterRange
from finetune_trainer.chat.sandbox.reasoning import Fate
from finetune_trainer.chat.templates import SPECIAL_TOKENS, TOOL_TOKENS
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.strict_json import excerpt

HIDDEN = "\uf8d8"
"""Stands in front of a character that numbers the hidden token; `sandbox.marks` uses U+F8D0 to U+F8D4."""

FIRST_NUMBER, NUMBERS = 0xF0000, 0xFFFD
HIDDEN_TOKEN = re.compile(f"{HIDDEN}([\U000f0000-\U000ffffc])")

MessageRange = tuple[int, int, int]
"""Characters [start, end) of an answer, and the index of its message."""


class RenderedChat(NamedTuple):
    """The text that the template printed, with the row's control tokens as text again."""

    text: str
    spans: list[MessageRange]
    row_tokens: list[CharacterRange]
    """Place of each control token that comes from the row, in order."""
    reasoning: tuple[tuple[int, Fate], ...] = ()
    """What became of the reasoning of each answer that has some, with the answer's message."""


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

        known = {token for tokens in (*SPECIAL_TOKENS.values(), *TOOL_TOKENS.values()) for token in tokens}
        known |= set(tokenizer.all_special_tokens)
        added = {
            str(token): number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or str(token) in known
        }
        self._ids = frozenset(added.values())

        # Longest first, so that the pattern finds no token within a longer one.
        self._names = sorted(set(added) - {""}, key=len, reverse=True)[:NUMBERS]
        self._numbers = {name: chr(FIRST_NUMBER + index) for index, name in enumerate(self._names)}
        self._first_letters = {name[0] for name in self._names}
        self._pattern = re.compile("|".join(map(re.escape, self._names))) if self._names else None

    def __contains__(self, token: int) -> bool:
        """True for the id of a control token."""
        return token in self._ids

    def find(self, value: Any) -> str | None:
        """The first control token in a text, or in any text of a list or an object."""
        if isinstance(value, str):
            # Six times as fast as one pattern of tokens that begin differently.
            for letter in self._first_letters:
                if letter in value and self._pattern is not None:
                    match = self._pattern.search(value)
                    return match.group() if match is not None else None
            return None

        entries = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        return next((found for entry in entries if (found := self.find(entry)) is not None), None)

    def hide(self, value: Any) -> Any:
        """The value with its control tokens hidden. Raises BadRowError if it has the character that hides them."""
        if isinstance(value, str) and self._pattern is not None:
            if HIDDEN in value:
                raise BadRowError(
                    f"the row contains a control token and the character U+{ord(HIDDEN):04X} (Unicode private use): "
                    "remove one of them"
                )
            return self._pattern.sub(lambda found: HIDDEN + self._numbers[found.group()], value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(entry) for key, entry in value.items()}
        return [self.hide(entry) for entry in value] if isinstance(value, list) else value

    def restore(self, text: str, spans: list[MessageRange]) -> RenderedChat:
        """The text with its hidden tokens put back, and the spans moved along.

        Raises BadRowError if the template changed a hidden token.
        """
        parts: list[str] = []
        row_tokens: list[CharacterRange] = []
        ends, shifts = [0], [0]  # from ends[i] on, the restored text is shifts[i] characters ahead
        at = shift = 0

        for found in HIDDEN_TOKEN.finditer(text):
            name = self._names[ord(found.group(1)) - FIRST_NUMBER]
            parts += (text[at : found.start()], name)
            row_tokens.append((found.start() + shift, found.start() + shift + len(name)))
            at = found.end()
            shift += len(name) - len(found.group())
            ends.append(at)
            shifts.append(shift)

        restored = "".join([*parts, text[at:]])
        if HIDDEN in restored or f"\\u{ord(HIDDEN):04x}" in restored.lower():
            raise BadRowError("the chat template takes apart a control token that the row contains as text")

        def move(place: int) -> int:
            return place + shifts[bisect_right(ends, place) - 1]

        return RenderedChat(restored, [(move(start), move(end), message) for start, end, message in spans], row_tokens)

    def encode(self, text: str, row_tokens: list[CharacterRange]) -> tuple[list[int], list[CharacterRange]]:
        """Token ids of a rendered text, and the characters that each stands for; the row's control tokens are encoded
        as plain text. Raises BadRowError if the tokenizer cannot do that."""
        plain = _with_letters(text, row_tokens)
        ids, ranges = self._tokenize(plain, split=False)  # both [T]
        if not row_tokens:
            return ids, ranges

        whole_ids: list[int] = []
        whole_ranges: list[CharacterRange] = []
        starts = [start for start, _ in row_tokens]

        for first, last, start, end in self._sections(ids, ranges, len(text)):
            has_row_token = bisect_right(starts, start - 1) < bisect_right(starts, end - 1)
            found = ids[first:last], ranges[first:last]
            if has_row_token:
                found = self._encode_part(text, plain, start, end, ids[first:last])

            # The section, then the template's control token that ends it.
            whole_ids += [*found[0], *ids[last : last + 1]]
            whole_ranges += [*found[1], *ranges[last : last + 1]]

        return whole_ids, whole_ranges

    def _sections(
        self, ids: list[int], ranges: list[CharacterRange], length: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """Tokens [first, last) and characters [start, end) between one control token and the next."""
        first = start = 0
        for index, token in enumerate(ids):
            if token in self._ids:
                yield first, index, start, ranges[index][0]
                first, start = index + 1, ranges[index][1]

        yield first, len(ids), start, length

    def _encode_part(
        self, text: str, plain: str, start: int, end: int, expected: list[int]
    ) -> tuple[list[int], list[CharacterRange]]:
        """Token ids and characters of text[start:end], encoded alone; `expected` are the ids of plain[start:end] within
        the whole."""
        for prefixes in ("as the tokenizer does", "never"):
            with _word_prefix(self._tokenizer, prefixes):
                if self._tokenize(plain[start:end], split=True)[0] != expected:
                    continue
                ids, ranges = self._tokenize(text[start:end], split=True)

            if not self._ids.intersection(ids):
                return ids, [(begin + start, finish + start) for begin, finish in ranges]

        found = excerpt(self.find(text[start:end]))
        raise BadRowError(f"the row contains control token {found} as text, which this tokenizer cannot encode as text")

    def _tokenize(self, text: str, *, split: bool) -> tuple[list[int], list[CharacterRange]]:
        """Token ids and characters of a text; with `split`, control tokens in it are plain text."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=split)
        return found["input_ids"], found["offset_mapping"]


def _with_letters(text: str, ranges: Iterable[CharacterRange]) -> str:
    """The text with letters in place of the row's control tokens, as many as they have."""
    parts: list[str] = []
    at = 0
    for start, end in ranges:
        parts += (text[at:start], "x" * (end - start))
        at = end

    return "".join([*parts, text[at:]])


@contextmanager
def _word_prefix(tokenizer: Any, scheme: str) -> Iterator[None]:
    """Keeps SentencePiece, with `never`, from marking a new word in front of a text that continues one."""
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
