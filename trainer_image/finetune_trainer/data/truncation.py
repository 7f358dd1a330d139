"""Truncates texts that are too long for preflight to encode, while they are still bytes.

Preflight encodes no row of more than a million characters. Of a longer text it needs to know only that it is longer,
that it is valid, whether it is blank, and what tells it from others. Python would hold four bytes for each character of
a text with one emoji: 50 MB became 200 MB, several times over.

So a long text is decoded in pieces, all of which are checked; only the first million characters are kept, and the first
piece that is not blank. That is more than a row may have to be encoded, so no truncated text is taken for a short one.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from finetune_trainer.data.strict_json import refuse_surrogates

MAX_ENCODED_CHARACTERS = 1_000_000
"""Characters of the longest row that preflight encodes."""

PIECE_BYTES = 2**20
# A string, or the text's end where the string has none, so that no quotation mark within is taken for a start.
STRING = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)(?:"|\\?\Z)', re.DOTALL)
INSIDE_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
OUTSIDE_STRINGS = re.compile(rb'[^"{}\[\]]*+')
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character
JSON_START = re.compile(rb'\s*(?:\[\s*[\[{"\-0-9tfn\]]|\{\s*["}])')
HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")
MAX_ESCAPE_BYTES = 6  # such as \u00e9
Bytes = bytes | bytearray | memoryview


class Truncated(NamedTuple):
    """A value whose long texts are truncated."""

    value: Any
    fingerprint: int
    """Hash of all long texts, whole; equal for equal rows within one process."""


def long_bytes(max_characters: int) -> int:
    """Bytes of UTF-8 beyond which a text has more characters than `max_characters`, whatever they are."""
    return 4 * max_characters + 4


def truncate_json(text: bytes | bytearray, max_characters: int) -> tuple[str, int]:
    """A JSON text with its long strings truncated, and their fingerprint (0 if none is long).

    Raises ValueError for text that is not UTF-8, and for whatever `load_strict` refuses in the part left out.
    """
    truncator = _Truncator(max_characters)
    try:
        shorter = truncator.truncate_strings(text)
        return shorter.decode(), truncator.fingerprint
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from None  # its position is one in the piece, which would mislead
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.object[error.start]:#x}") from None


def truncate_text(text: Bytes, max_characters: int) -> Truncated:
    """A long text in UTF-8, truncated; JSON in it stays JSON. Raises ValueError if it is not UTF-8."""
    truncator = _Truncator(max_characters)
    try:
        return Truncated(truncator.truncate_text(text), truncator.fingerprint)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.object[error.start]:#x}") from None


def count_characters(data: Bytes) -> int:
    """Number of characters of UTF-8, counted without decoding it."""
    return len(bytes(data).translate(None, CONTINUATION))


class ValueEnd:
    """Finds the end of a JSON object or list whose bytes come piece by piece; looks at each byte once."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._in_string = False

    def find(self, data: bytearray) -> int | None:
        """The value's length in bytes; None if it does not end in `data`, which grows from call to call."""
        while self._at < len(data):
            if self._in_string:
                self._at = _match_end(INSIDE_STRING, data, self._at)
                if self._at == len(data) or data[self._at] == ord("\\"):
                    return None
                self._in_string = False
            else:
                self._at = _match_end(OUTSIDE_STRINGS, data, self._at)
                if self._at == len(data):
                    return None
                self._in_string = data[self._at] == ord('"')
                self._depth += {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}.get(data[self._at], 0)

            self._at += 1
            if self._depth == 0:
                return self._at

        return None


def _match_end(pattern: re.Pattern[bytes], data: bytearray, start: int) -> int:
    found = pattern.match(data, start)
    assert found is not None  # both patterns match the empty text, too
    return found.end()


class _Truncator:
    """Truncates texts, and takes their fingerprint."""

    def __init__(self, max_characters: int) -> None:
        self._max_characters = max_characters
        self.fingerprint = 0

    def truncate_strings(self, data: bytes | bytearray) -> bytes | bytearray:
        """JSON with every long string truncated; `data` itself if no string is long."""
        parts: list[Bytes] = []
        at = 0
        for match in STRING.finditer(data):
            start, end = match.span(1)
            if end - start > long_bytes(self._max_characters):
                parts += (data[at:start], self._truncate_string(memoryview(data)[start:end]))
                at = end

        return b"".join([*parts, data[at:]]) if parts else data

    def _truncate_string(self, raw: memoryview) -> Bytes:
        """A JSON string, without its quotation marks."""
        _, beginning = next(_pieces_of_string(raw))
        if JSON_START.match(beginning.encode()):
            text = b"".join(decoded.encode() for _, decoded in _pieces_of_string(raw))
            return json.dumps(self.truncate_text(text), ensure_ascii=False).encode()[1:-1]
        return b"".join(self._keep(_pieces_of_string(raw)))

    def truncate_text(self, text: Bytes) -> str:
        """A text in UTF-8, truncated."""
        if JSON_START.match(text[:PIECE_BYTES]) and (shorter := self._truncate_inner(bytes(text))) is not None:
            return shorter
        return b"".join(self._keep(_pieces_of_text(text))).decode()

    def _truncate_inner(self, text: bytes) -> str | None:
        """JSON that is a column's text; None if it is not valid. It stays whole if none of its strings is long."""
        inner = _Truncator(self._max_characters)
        try:
            shorter = inner.truncate_strings(text)
        except ValueError:
            return None

        if shorter is not text:
            self.fingerprint = hash((self.fingerprint, inner.fingerprint))
        return shorter.decode()

    def _keep(self, pieces: Iterator[tuple[Bytes, str]]) -> Iterator[Bytes]:
        """Bytes of the pieces that are kept; all pieces are checked and go into the fingerprint."""
        characters, has_words = 0, False
        for raw, text in pieces:
            self.fingerprint = hash((self.fingerprint, text))
            is_blank = not text.strip()
            if characters <= self._max_characters or not (has_words or is_blank):
                characters += len(text)
                yield raw
            has_words |= not is_blank


def _pieces_of_text(text: Bytes) -> Iterator[tuple[Bytes, str]]:
    """Bytes and characters of a text, piece by piece."""
    view, start = memoryview(text), 0
    while start < len(view):
        end = _character_start(view, start, min(len(view), start + PIECE_BYTES))
        raw = bytes(view[start:end])
        yield raw, raw.decode()
        start = end


def _pieces_of_string(raw: memoryview) -> Iterator[tuple[Bytes, str]]:
    """Bytes and characters of a JSON string, piece by piece. Raises ValueError for what JSON does not allow."""
    start = 0
    while start < len(raw):
        end = _character_start(raw, start, min(len(raw), start + PIECE_BYTES))
        if end < len(raw):
            end = start + _length_of_whole_escapes(bytes(raw[start:end]))

        piece = bytes(raw[start:end])
        written = f'"{piece.decode()}"'
        text = json.loads(written)
        refuse_surrogates(written, text)
        yield piece, text
        start = end


def _character_start(data: memoryview, start: int, end: int) -> int:
    """The position `end`, or up to three bytes before it, so that no character is torn."""
    for at in range(end, max(start, end - 4), -1):
        if at == len(data) or data[at] & 0xC0 != 0x80:
            return at
    return end


def _length_of_whole_escapes(piece: bytes) -> int:
    """Length of the piece without an unfinished escape, or half of a surrogate pair, at its end."""
    at = piece.rfind(b"\\", len(piece) - MAX_ESCAPE_BYTES)
    if at >= 0:
        needed = MAX_ESCAPE_BYTES if piece[at + 1 : at + 2] in (b"u", b"") else 2
        if _begins_escape(piece, at) and at + needed > len(piece):
            piece = piece[:at]

    half = HIGH_SURROGATE.search(piece, len(piece) - MAX_ESCAPE_BYTES)
    if half is not None and _begins_escape(piece, half.start()):
        return half.start()
    return len(piece)


def _begins_escape(piece: bytes, at: int) -> bool:
    """True if the backslash at `at` is not itself escaped: an even number of backslashes stands before it."""
    before = piece[:at]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 0
