"""Texts that are too long to be encoded by preflight, cut while they are bytes.

Preflight encodes no row of more than a million characters. Of a longer text it needs to know only that it is
longer, that it is valid, whether it is blank, and what tells it from others. Python would hold four bytes for each
character of a text with one emoji: 50 MB became 200 MB, several times over.

So a long text is decoded in pieces, all of which are checked; only the first million characters are kept, and the first
piece that is not blank. That is more than a row may have to be encoded, so no truncated text is taken for a short one.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from finetune_trainer.data.strict_json import refuse_surrogates

MAX_ENCODED_CHARACTERS = 1_000_000
LONG_BYTES = 4 * MAX_ENCODED_CHARACTERS + 4  # of UTF-8, more characters than that whatever they are
PIECE_BYTES = 2**20
# A string, to the end of the text where it has no end, so that no quotation mark within is taken for the start of one.
STRING = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)(?:"|\\?\Z)', re.DOTALL)
INSIDE_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
OUTSIDE_STRINGS = re.compile(rb'[^"{}\[\]]*+')
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character
JSON_START = re.compile(rb'\s*(?:\[\s*[\[{"\-0-9tfn\]]|\{\s*["}])')
HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")
Bytes = bytes | bytearray | memoryview


class Cut(NamedTuple):
    """A value whose long texts are cut."""

    value: Any
    left_out: int
    """Fingerprint of all long texts, whole; equal for equal rows within one process."""


def shorten_json(line: bytes | bytearray) -> tuple[str, int]:
    """A long JSON text with its long strings cut, and their fingerprint. Raises ValueError as `load_strict` does for
    what it cuts, and for what is not UTF-8."""
    shortener = _Shortener()
    try:
        shorter = shortener.shorten(line)
        return shorter.decode(), shortener.left_out
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from None  # a place in the piece would mislead
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.object[error.start]:#x}") from None


def cut_text(text: Bytes) -> Cut:
    """A long text in UTF-8. JSON in it stays JSON. Raises ValueError where it is not UTF-8."""
    shortener = _Shortener()
    try:
        return Cut(shortener.cut_plain(text), shortener.left_out)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.object[error.start]:#x}") from None


def count_characters(data: Bytes) -> int:
    """Characters of UTF-8, without decoding it."""
    return len(bytes(data).translate(None, CONTINUATION))


class ValueEnd:
    """Finds the end of a JSON object or list whose bytes come piece by piece, each looked at once."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._in_string = False

    def find(self, data: bytearray) -> int | None:
        """The value's length; None where it does not end in `data`, which grows from call to call."""
        while self._at < len(data):
            if self._in_string:
                self._at = _end_of(INSIDE_STRING, data, self._at)
                if self._at == len(data) or data[self._at] == ord("\\"):
                    return None
                self._in_string = False
            else:
                self._at = _end_of(OUTSIDE_STRINGS, data, self._at)
                if self._at == len(data):
                    return None
                self._in_string = data[self._at] == ord('"')
                self._depth += {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}.get(data[self._at], 0)
            self._at += 1
            if self._depth == 0:
                return self._at
        return None


def _end_of(pattern: re.Pattern[bytes], data: bytearray, start: int) -> int:
    found = pattern.match(data, start)
    assert found is not None  # both patterns match nothing, too
    return found.end()


class _Shortener:
    """Cuts texts, and takes fingerprints of them."""

    def __init__(self) -> None:
        self.left_out = 0

    def shorten(self, data: bytes | bytearray) -> bytes | bytearray:
        """JSON with every long string cut."""
        parts: list[Bytes] = []
        at = 0
        for match in STRING.finditer(data):
            start, end = match.span(1)
            if end - start > LONG_BYTES:
                parts += (data[at:start], self._cut_string(memoryview(data)[start:end]))
                at = end
        return b"".join([*parts, data[at:]]) if parts else data

    def _cut_string(self, raw: memoryview) -> Bytes:
        """A JSON string without its quotation marks, cut."""
        _, beginning = next(_pieces_of_string(raw))
        if JSON_START.match(beginning.encode()):
            text = b"".join(decoded.encode() for _, decoded in _pieces_of_string(raw))
            return json.dumps(self.cut_plain(text), ensure_ascii=False).encode()[1:-1]
        return b"".join(self._keep(_pieces_of_string(raw)))

    def cut_plain(self, text: Bytes) -> str:
        """A text in UTF-8, cut."""
        if JSON_START.match(text[:PIECE_BYTES]) and (shorter := self._shorten_inner(bytes(text))) is not None:
            return shorter
        return b"".join(self._keep(_pieces_of_text(text))).decode()

    def _shorten_inner(self, text: bytes) -> str | None:
        """JSON as the text of a column; None where it is none. What has no long string is kept as it is."""
        inner = _Shortener()
        try:
            shorter = inner.shorten(text)
        except ValueError:
            return None
        if shorter is not text:
            self.left_out = hash((self.left_out, inner.left_out))
        return shorter.decode()

    def _keep(self, pieces: Iterator[tuple[Bytes, str]]) -> Iterator[Bytes]:
        """The bytes of the pieces that are kept."""
        characters, has_words = 0, False
        for raw, text in pieces:
            self.left_out = hash((self.left_out, text))
            is_blank = not text.strip()
            if characters <= MAX_ENCODED_CHARACTERS or not (has_words or is_blank):
                characters += len(text)
                yield raw
            has_words |= not is_blank


def _pieces_of_text(text: Bytes) -> Iterator[tuple[Bytes, str]]:
    view, start = memoryview(text), 0
    while start < len(view):
        end = _character_start(view, start, min(len(view), start + PIECE_BYTES))
        raw = bytes(view[start:end])
        yield raw, raw.decode()
        start = end


def _pieces_of_string(raw: memoryview) -> Iterator[tuple[Bytes, str]]:
    """Bytes and text of the pieces of a JSON string. Raises ValueError for what JSON does not allow."""
    start = 0
    while start < len(raw):
        end = _character_start(raw, start, min(len(raw), start + PIECE_BYTES))
        if end < len(raw):
            end = start + _whole_escapes(bytes(raw[start:end]))
        piece = bytes(raw[start:end])
        written = f'"{piece.decode()}"'
        text = json.loads(written)
        refuse_surrogates(written, text)
        yield piece, text
        start = end


def _character_start(data: memoryview, start: int, end: int) -> int:
    """`end`, or up to three bytes before it, so that no character is torn."""
    for at in range(end, max(start, end - 4), -1):
        if at == len(data) or data[at] & 0xC0 != 0x80:
            return at
    return end


def _whole_escapes(piece: bytes) -> int:
    """How much of a piece, which may end anywhere, ends with a whole escape and no half of a pair."""
    at = piece.rfind(b"\\", len(piece) - 6)
    if at >= 0:
        before = piece[: at + 1]
        is_start = (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
        needed = 6 if piece[at + 1 : at + 2] in (b"u", b"") else 2
        if is_start and at + needed > len(piece):
            piece = piece[:at]
    half = HIGH_SURROGATE.search(piece, len(piece) - 6)
    if half is not None:
        before = piece[: half.start()]
        if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
            return half.start()
    return len(piece)
