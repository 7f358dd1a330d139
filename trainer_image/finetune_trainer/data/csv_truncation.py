"""Lines of CSV in which long fields are cut before Python's csv module sees them: it holds four bytes for each
character of a field, and as much again while the field grows."""

import csv
import io
import re
from collections import deque
from enum import Enum, auto

from finetune_trainer.data.truncation import LONG_BYTES, PIECE_BYTES, count_characters, cut_text

QUOTED = re.compile(rb'[^"]*+(?:""[^"]*+)*+')
LINES = re.compile(rb"[^\r\n]*+(?:\r\n|\r|\n|\Z)")
NOT_TEXT = b'"\xff"'


class _At(Enum):
    """Where in a record."""

    START = auto()
    UNQUOTED = auto()
    QUOTED = auto()
    BEHIND_QUOTES = auto()
    IN_GARBAGE = auto()


class CutLines:
    """An iterator for `csv.reader`: one line, or one whole record where it has quotation marks or is long."""

    def __init__(self, stream: io.BufferedReader, delimiter: str, longest_field: int) -> None:
        """`longest_field` in characters; raises csv.Error in the place of a record with a longer one."""
        self._stream = stream
        self._read_ahead: deque[bytes] = deque()
        self._delimiter = delimiter.encode()
        self._unquoted = re.compile(b"[^\r\n" + re.escape(self._delimiter) + b"]*+")
        self._longest = longest_field
        self.is_cutting = False
        """Off for the header."""
        self.line_num = 0
        """Lines read so far."""
        self.left_out = 0
        """Fingerprint of the newest record's long fields, whole."""

    def __iter__(self) -> "CutLines":
        return self

    def __next__(self) -> str:
        self.left_out = 0
        line = self._read()
        if not line:
            raise StopIteration
        if b'"' in line or not _ends_line(line):
            line = _Record(self, line).assemble()
        else:
            self.line_num += 1
        return line.decode("utf-8", "surrogateescape")

    def _read(self) -> bytes:
        """The next line or piece of one, never ending between two quotation marks or CR and LF."""
        if self._read_ahead:
            return self._read_ahead.popleft()
        line = self._stream.readline(PIECE_BYTES)
        while line.endswith((b'"', b"\r")) and (more := self._stream.readline(PIECE_BYTES)):
            line += more
        if b"\r" in line.removesuffix(b"\r\n"):
            lines = LINES.findall(line)
            line, self._read_ahead = lines[0], deque(found for found in lines[1:] if found)
        return line


class _Record:
    """One record, put together from pieces."""

    def __init__(self, lines: CutLines, first: bytes) -> None:
        self._lines = lines
        self._piece = first
        self._at = _At.START
        self._out: list[bytes] = []
        self._field: list[bytes] = []
        self._bytes = self._characters = 0
        self._is_too_long = False

    def assemble(self) -> bytes:
        """The record, with long fields cut. Raises csv.Error where one is too long."""
        while self._piece:
            self._take(self._piece)
            ends_line = _ends_line(self._piece)
            self._lines.line_num += ends_line
            if ends_line and self._at is not _At.QUOTED:
                break
            self._piece = self._lines._read()
        else:
            self._lines.line_num += 1
        if self._at is _At.QUOTED:
            self._out.append(b'"')  # csv says then that it has no end
        elif self._at is _At.UNQUOTED:
            self._end_field(is_quoted=False)
        if self._is_too_long:
            raise csv.Error(f"field larger than field limit ({self._lines._longest})")
        return b"".join(self._out)

    def _take(self, piece: bytes) -> None:
        at = 0
        while at < len(piece):
            if self._at is _At.START:
                is_quoted = piece.startswith(b'"', at)
                self._at, at = (_At.QUOTED, at + 1) if is_quoted else (_At.UNQUOTED, at)
            if self._at in (_At.UNQUOTED, _At.QUOTED):
                pattern = QUOTED if self._at is _At.QUOTED else self._lines._unquoted
                found = pattern.match(piece, at)
                assert found is not None
                self._add(found.group())
                at = found.end()
                if at == len(piece):
                    return
                if self._at is _At.QUOTED:
                    self._end_field(is_quoted=True)
                    self._at, at = _At.BEHIND_QUOTES, at + 1
                    continue
                self._end_field(is_quoted=False)
            if piece.startswith(self._lines._delimiter, at) and self._at is not _At.IN_GARBAGE:
                self._out.append(self._lines._delimiter)
                self._at, at = _At.START, at + 1
            else:  # the end of the line, or what csv refuses up to there
                self._out.append(piece[at:])
                self._at = _At.IN_GARBAGE
                return

    def _add(self, part: bytes) -> None:
        self._bytes += len(part)
        if self._bytes > self._lines._longest:
            counted = [part] if self._characters else [*self._field, part]
            self._characters += sum(map(count_characters, counted))
        if self._characters > self._lines._longest:
            self._is_too_long = True
            self._field.clear()
        if not self._is_too_long:
            self._field.append(part)

    def _end_field(self, *, is_quoted: bool) -> None:
        if self._bytes > LONG_BYTES and self._lines.is_cutting:
            whole = b"".join(self._field)
            self._field.clear()
            self._out.append(self._cut(whole.replace(b'""', b'"') if is_quoted else whole))
        elif is_quoted:
            self._out += (b'"', *self._field, b'"')
        else:
            self._out += self._field
        self._field.clear()
        self._bytes = self._characters = 0

    def _cut(self, text: bytes) -> bytes:
        try:
            shorter: str
            shorter, fingerprint = cut_text(text)
        except ValueError:
            return NOT_TEXT
        self._lines.left_out = hash((self._lines.left_out, fingerprint))
        return b'"' + shorter.encode().replace(b'"', b'""') + b'"'


def _ends_line(piece: bytes) -> bool:
    return piece.endswith((b"\n", b"\r"))
