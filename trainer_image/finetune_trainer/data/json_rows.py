"""Rows of JSON files, read piece by piece: one value per line, a list, or values one after the other."""

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.data.data_files import UnreadableFileError, open_bytes
from finetune_trainer.data.strict_json import DECODER, load_strict, refuse_surrogates
from finetune_trainer.data.truncation import Truncated, ValueEnd, count_characters, long_bytes, truncate_json

MAX_ROW_BYTES = 64 * 2**20
PIECE_BYTES = 2**16
LINE_PIECE_BYTES = 2**20
WHITESPACE = " \t\r\n"
TOO_LONG = f"an entry is longer than {MAX_ROW_BYTES // 2**20} MiB: split it into several rows"
NOT_A_LIST = "a .json file must hold a list of rows, or rows one after the other"


def read_json_lines(path: Path, *, max_characters: int | None = None) -> Iterator[tuple[str, Any]]:
    """Place and value of each line that is not blank; a ValueError if it is not valid.

    With `max_characters`, a value with texts longer than that comes as a Truncated.
    """
    with open_bytes(path) as file:
        number = 0
        while line := _read_line(file):
            number += 1
            if len(line) - line.endswith(b"\n") > MAX_ROW_BYTES:
                message = f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB: split it into several rows"
                yield f":{number}", ValueError(message)

            # Of a long row only one form is kept at a time: bytes, then text, then value.
            elif max_characters is not None and len(line) > long_bytes(max_characters) and not line.isspace():
                shorter, line = _truncate(line, max_characters), b""
                value = shorter if isinstance(shorter, ValueError) else _parse_truncated(*shorter)
                shorter = ("", 0)
                yield f":{number}", value

            elif not line.isspace():
                text, line = _decode(line), b""
                value = text if isinstance(text, ValueError) else _parse(text)
                text = ""
                yield f":{number}", value


def _read_line(file: io.BufferedReader) -> bytes | bytearray:
    """The next line; of a line that is too long a part that still is."""
    line = file.readline(LINE_PIECE_BYTES)
    if len(line) < LINE_PIECE_BYTES or line.endswith(b"\n"):
        return line

    whole = bytearray(line)  # grows in place, whereas readline would join a list of pieces
    while (piece := file.readline(LINE_PIECE_BYTES)) and len(whole) <= MAX_ROW_BYTES:
        whole += piece
        if piece.endswith(b"\n"):
            return whole

    # Skip the rest of a line that is too long.
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(LINE_PIECE_BYTES)
    return whole


def _decode(line: bytes | bytearray) -> str | ValueError:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8: byte {error.object[error.start]:#x} at {error.start}")


def _parse(text: str) -> Any:
    try:
        return load_strict(text)
    except ValueError as error:
        return ValueError(f"not valid JSON: {error}")


def _truncate(line: bytes | bytearray, max_characters: int) -> tuple[str, int] | ValueError:
    try:
        return truncate_json(line, max_characters)
    except ValueError as error:
        return ValueError(f"not valid JSON: {error}")


def _parse_truncated(text: str, fingerprint: int) -> Any:
    value = _parse(text)
    return value if isinstance(value, ValueError) or not fingerprint else Truncated(value, fingerprint)


def read_json(path: Path, *, max_characters: int | None = None) -> Iterator[tuple[str, Any]]:
    """Place and value of each entry of a list, or of each of several values one after the other.

    With `max_characters`, a value with texts longer than that comes as a Truncated. Raises UnreadableFileError if the
    text is not valid, as nothing says where the next row would begin.
    """
    with open_bytes(path) as file:
        text = _Text(file, max_characters)
        is_list = text.skip(WHITESPACE) == "["
        if is_list:
            text.start += 1

        number = 0
        while (following := text.skip(WHITESPACE)) not in ("", "]"):
            if is_list and number and following != ",":
                raise UnreadableFileError(f"not valid JSON: ',' or ']' is missing after entry {number}")
            if is_list and number:
                text.start += 1

            number += 1
            value = text.take_value(number)

            # A file with a single value that is no list, such as {"data": [...]}, holds no rows.
            row = value.value if isinstance(value, Truncated) else value
            if not is_list and number == 1 and (not isinstance(row, dict) or not text.skip(WHITESPACE)):
                raise UnreadableFileError(NOT_A_LIST)
            yield f"[{number}]", value

        if is_list != (following == "]"):
            message = "the list has no end" if is_list else "']' without a '[' before it"
            raise UnreadableFileError(f"not valid JSON: {message}")


class _Text:
    """A file's text, of which only what is in use is in memory."""

    def __init__(self, file: io.BufferedReader, max_characters: int | None) -> None:
        self._file = file
        self._max_characters = max_characters
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._buffer = ""
        self.start = 0

    def skip(self, characters: str) -> str:
        """The next character that is none of these, which stays in place; empty at the file's end."""
        while True:
            while self.start < len(self._buffer):
                if self._buffer[self.start] not in characters:
                    return self._buffer[self.start]
                self.start += 1
            if not self._read(PIECE_BYTES):
                return ""

    def take_value(self, number: int) -> Any:
        """The next value. Decoding a value that does not end in the buffer is tried again with twice as much text."""
        self.skip(WHITESPACE)
        while True:
            if self._max_characters is not None and self._is_long_container(self._max_characters):
                return self._take_long_value(number, self._max_characters)

            try:
                value, end = DECODER.raw_decode(self._buffer, self.start)
                refuse_surrogates(self._buffer[self.start : end], value)
                length = end - self.start
                if end < len(self._buffer) or not self._read(PIECE_BYTES):
                    self.start += length  # reading has moved the value to the buffer's start
                    return value
            except json.JSONDecodeError as error:
                may_go_on = error.pos >= len(self._buffer) - 16 or error.msg.startswith("Unterminated")
                if not may_go_on or not self._read(max(PIECE_BYTES, len(self._buffer) - self.start)):
                    raise UnreadableFileError(f"entry {number} is not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                why = "nested too deeply" if isinstance(error, RecursionError) else error
                raise UnreadableFileError(f"entry {number} is not valid JSON: {why}") from None

    def _is_long_container(self, max_characters: int) -> bool:
        """True if the next value is an object or list and the buffer holds more of it than is decoded as a whole."""
        return len(self._buffer) - self.start > long_bytes(max_characters) and self._buffer[self.start] in "{["

    def _take_long_value(self, number: int, max_characters: int) -> Any:
        """The next object or list, which is never decoded as a whole."""
        data = self._take_bytes(number)
        try:
            text, fingerprint = truncate_json(data, max_characters)
            data.clear()
            value = load_strict(text)
        except json.JSONDecodeError as error:
            raise UnreadableFileError(f"entry {number} is not valid JSON: {error.msg}") from None
        except ValueError as error:
            raise UnreadableFileError(f"entry {number} is not valid JSON: {error}") from None
        return Truncated(value, fingerprint) if fingerprint else value

    def _take_bytes(self, number: int) -> bytearray:
        """Bytes of the next object or list; what follows it becomes the buffer."""
        data = bytearray(self._buffer[self.start :].encode() + self._decoder.getstate()[0])
        self._buffer, self.start = "", 0
        self._decoder.reset()

        end = ValueEnd()
        while (length := end.find(data)) is None:
            piece = self._file.read(LINE_PIECE_BYTES)
            if not piece:
                raise UnreadableFileError(f"entry {number} is not valid JSON: it has no end")
            data += piece
            if len(data) > MAX_ROW_BYTES and count_characters(data) > MAX_ROW_BYTES:
                raise UnreadableFileError(TOO_LONG)

        try:
            self._buffer = self._decoder.decode(bytes(data[length:]))
        except UnicodeDecodeError:
            raise UnreadableFileError("not UTF-8") from None
        del data[length:]
        return data

    def _read(self, size: int) -> bool:
        """Reads on, and drops what was taken. Returns False at the file's end."""
        if len(self._buffer) - self.start > MAX_ROW_BYTES:
            raise UnreadableFileError(TOO_LONG)

        data = self._file.read(size)
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            raise UnreadableFileError("not UTF-8") from None

        self._buffer = self._buffer[self.start :] + text
        self.start = 0
        return bool(data)
