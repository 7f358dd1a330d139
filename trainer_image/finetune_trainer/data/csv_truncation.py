"""Lines of CSV whose long fields are truncated before Python's csv module sees them.

The module holds four bytes for each character of a field, and as much again while the field grows.
"""

import csv
import io
import re
from collections import deque
from enum import Enum, auto

from finetune_trainer.data.truncation import PIECE_BYTES, count_characters, long_bytes, truncate_text

QUOTED = re.compile(rb'[^"]*+(?:""[^"]*+)*+')
LINES = re.compile(rb"[^\r\n]*+(?:\r\n|\r|\n|\Z)")
NOT_TEXT = b'"\xff"'


class _State(Enum):
    """The part of a record that is being read."""

    FIELD_START = auto()
    UNQUOTED = auto()
    QUOTED = auto()
    BEHIND_QUOTES = auto()
    IN_GARBAGE = auto()


class TruncatedLines:
    """An iterator for `csv.reader`: one line, or one whole record if it has quotation marks or is long."""

    def __init__(self, stream: io.BufferedReader, delimiter: str, max_field: int) -> None:
        """`max_field`: characters of the longest field; csv.Error is raised in place of a record with a longer one."""
        self._stream = stream
        self._read_ahead: deque[bytes] = deque()
        self.delimiter = delimiter.encode()
        self.unquoted = re.compile(b"[^\r\n" + re.escape(self.delimiter) + b"]*+")
        self.max_field = max_field

        self.max_characters: int | None = None
        """Fields of more characters are truncated; None, at first, truncates none."""

        self.line_num = 0
        """Lines read so far."""

        self.fingerprint = 0
        """Hash of the newest record's long fields, whole; 0 if it has none."""

    def __iter__(self) -> "TruncatedLines":
        return self

    def __next__(self) -> str:
        self.fingerprint = 0
        line = self.read()
        if not line:
            raise StopIteration

        if b'"' in line or not _ends_line(line):
            line = _Record(self, line).assemble()
        else:
            self.line_num += 1
        return line.decode("utf-8", "surrogateescape")

    def read(self) -> bytes:
        """The next line or a piece of one, never ending between two quotation marks or between CR and LF."""
        if self._read_ahead:
            return self._read_ahead.popleft()

        line = self._stream.readline(PIECE_BYTES)
        while line.endswith((b'"', b"\r")) and (more := self._stream.readline(PIECE_BYTES)):
            line += more

        # Lines of old Macs end with CR alone.
        if b"\r" in line.removesuffix(b"\r\n"):
            lines = LINES.findall(line)
            line, self._read_ahead = lines[0], deque(found for found in lines[1:] if found)
        return line


class _Record:
    """One record, put together from pieces."""

    def __init__(self, lines: TruncatedLines, first: bytes) -> None:
        self._lines = lines
        self._piece = first
        self._state = _State.FIELD_START
        self._out: list[bytes] = []
        self._field: list[bytes] = []
        self._bytes = self._characters = 0  # of the field
        self._is_too_long = False

    def assemble(self) -> bytes:
        """The record, with long fields truncated. Raises csv.Error if a field is too long."""
        while self._piece:
            self._take(self._piece)
            ends_line = _ends_line(self._piece)
            self._lines.line_num += ends_line
            if ends_line and self._state is not _State.QUOTED:
                break
            self._piece = self._lines.read()
        else:
            self._lines.line_num += 1

        # At the file's end a field may still be open.
        if self._state is _State.QUOTED:
            self._out.append(b'"')  # makes csv say that the field has no end
        elif self._state is _State.UNQUOTED:
            self._end_field(is_quoted=False)

        if self._is_too_long:
            raise csv.Error(f"field larger than field limit ({self._lines.max_field})")
        return b"".join(self._out)

    def _take(self, piece: bytes) -> None:
        """Goes through a piece, field by field."""
        at = 0
        while at < len(piece):
            if self._state is _State.FIELD_START:
                is_quoted = piece.startswith(b'"', at)
                self._state, at = (_State.QUOTED, at + 1) if is_quoted else (_State.UNQUOTED, at)

            if self._state in (_State.UNQUOTED, _State.QUOTED):
                pattern = QUOTED if self._state is _State.QUOTED else self._lines.unquoted
                found = pattern.match(piece, at)
                assert found is not None  # both patterns match the empty text, too
                self._add(found.group())
                at = found.end()
                if at == len(piece):
                    return
                if self._state is _State.QUOTED:
                    self._end_field(is_quoted=True)
                    self._state, at = _State.BEHIND_QUOTES, at + 1
                    continue
                self._end_field(is_quoted=False)

            if piece.startswith(self._lines.delimiter, at) and self._state is not _State.IN_GARBAGE:
                self._out.append(self._lines.delimiter)
                self._state, at = _State.FIELD_START, at + 1
            else:  # the end of the line, or something before it that csv refuses
                self._out.append(piece[at:])
                self._state = _State.IN_GARBAGE
                return

    def _add(self, part: bytes) -> None:
        """Adds a part to the field; a field that is too long is dropped."""
        self._bytes += len(part)
        if self._bytes > self._lines.max_field:
            counted = [part] if self._characters else [*self._field, part]
            self._characters += sum(map(count_characters, counted))

        if self._characters > self._lines.max_field:
            self._is_too_long = True
            self._field.clear()
        if not self._is_too_long:
            self._field.append(part)

    def _end_field(self, *, is_quoted: bool) -> None:
        """Puts out the field, truncated if it is long."""
        max_characters = self._lines.max_characters
        if max_characters is not None and self._bytes > long_bytes(max_characters):
            whole = b"".join(self._field)
            self._field.clear()
            self._out.append(self._truncate(whole.replace(b'""', b'"') if is_quoted else whole, max_characters))
        elif is_quoted:
            self._out += (b'"', *self._field, b'"')
        else:
            self._out += self._field

        self._field.clear()
        self._bytes = self._characters = 0

    def _truncate(self, text: bytes, max_characters: int) -> bytes:
        """A long field, truncated and quoted."""
        try:
            shorter: str
            shorter, fingerprint = truncate_text(text, max_characters)
        except ValueError:
            return NOT_TEXT
        self._lines.fingerprint = hash((self._lines.fingerprint, fingerprint))
        return b'"' + shorter.encode().replace(b'"', b'""') + b'"'


def _ends_line(piece: bytes) -> bool:
    return piece.endswith((b"\n", b"\r"))
