"""Rows of JSON files, read piece by piece: one value per line, a list, or values one after the other."""

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.data.data_files import UnreadableFileError, open_bytes
from finetune_trainer.data.strict_json import finite, load_strict, refuse_constant, refuse_surrogates, unique_keys
from finetune_trainer.data.truncation import LONG_BYTES, Cut, ValueEnd, count_characters, shorten_json

MAX_ROW_BYTES = 64 * 2**20
PIECE_BYTES = 2**16
LINE_PIECE_BYTES = 2**20
WHITESPACE = " \t\r\n"
TOO_LONG = f"an entry is longer than {MAX_ROW_BYTES // 2**20} MiB"
NO_LIST = "a .json file must hold a list of rows, or rows one after the other"


def read_json_lines(path: Path, *, is_cut: bool = False) -> Iterator[tuple[str, Any]]:
    """Place and value of each line that is not blank; a ValueError where it is not valid. With `is_cut`, a value with
    long texts comes as a Cut."""
    with open_bytes(path) as file:
        number = 0
        while line := _read_line(file):
            number += 1
            if len(line) - line.endswith(b"\n") > MAX_ROW_BYTES:
                yield f":{number}", ValueError(f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB")
            elif is_cut and len(line) > LONG_BYTES and not line.isspace():
                shorter, line = _shorten(line), b""
                value = shorter if isinstance(shorter, ValueError) else _parse_cut(*shorter)
                shorter = ("", 0)
                yield f":{number}", value
            elif not line.isspace():
                text, line = _decode(line), b""  # of a long row only one form is kept at a time
                value = text if isinstance(text, ValueError) else _parse(text)
                text = ""
                yield f":{number}", value


def _read_line(file: io.BufferedReader) -> bytes | bytearray:
    """The next line; of one that is too long only that it is."""
    line = file.readline(LINE_PIECE_BYTES)
    if len(line) < LINE_PIECE_BYTES or line.endswith(b"\n"):
        return line
    whole = bytearray(line)  # grows in place, where readline would join pieces of what it has read
    while (piece := file.readline(LINE_PIECE_BYTES)) and len(whole) <= MAX_ROW_BYTES:
        whole += piece
        if piece.endswith(b"\n"):
            return whole
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


def _shorten(line: bytes | bytearray) -> tuple[str, int] | ValueError:
    try:
        return shorten_json(line)
    except ValueError as error:
        return ValueError(f"not valid JSON: {error}")


def _parse_cut(text: str, left_out: int) -> Any:
    value = _parse(text)
    return value if isinstance(value, ValueError) or not left_out else Cut(value, left_out)


def read_json(path: Path, *, is_cut: bool = False) -> Iterator[tuple[str, Any]]:
    """Place and value of each entry of a list, or of values one after the other; with `is_cut`, one with long texts
    comes as a Cut. Raises UnreadableFileError where the text is not valid: nothing says where the next row would
    begin."""
    with open_bytes(path) as file:
        text = _Text(file, is_cut=is_cut)
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
            row = value.value if isinstance(value, Cut) else value
            if not is_list and number == 1 and (not isinstance(row, dict) or not text.skip(WHITESPACE)):
                raise UnreadableFileError(NO_LIST)
            yield f"[{number}]", value
        if is_list != (following == "]"):
            raise UnreadableFileError("not valid JSON: the list has no end" if is_list else "not valid JSON: ']'")


class _Text:
    """A file's text, of which what is in use is in memory."""

    def __init__(self, file: io.BufferedReader, *, is_cut: bool) -> None:
        self._file = file
        self._is_cut = is_cut
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=refuse_constant, parse_float=finite)
        self._buffer = ""
        self.start = 0

    def skip(self, characters: str) -> str:
        """The next character that is none of these; empty at the end."""
        while True:
            while self.start < len(self._buffer):
                if self._buffer[self.start] not in characters:
                    return self._buffer[self.start]
                self.start += 1
            if not self._read(PIECE_BYTES):
                return ""

    def take_value(self, number: int) -> Any:
        """The next value. A value that does not end in the buffer is tried again with twice as much."""
        self.skip(WHITESPACE)
        while True:
            if self._is_cut and len(self._buffer) - self.start > LONG_BYTES and self._buffer[self.start] in "{[":
                return self._take_long_value(number)
            try:
                value, end = self._json.raw_decode(self._buffer, self.start)
                refuse_surrogates(self._buffer[self.start : end], value)
                length = end - self.start
                if end < len(self._buffer) or not self._read(PIECE_BYTES):
                    self.start += length  # reading moved what is left to the buffer's start
                    return value
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._buffer) - 16 or error.msg.startswith("Unterminated")
                if not is_cut or not self._read(max(PIECE_BYTES, len(self._buffer) - self.start)):
                    raise UnreadableFileError(f"entry {number} is not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                why = "nested too deeply" if isinstance(error, RecursionError) else error
                raise UnreadableFileError(f"entry {number} is not valid JSON: {why}") from None

    def _take_long_value(self, number: int) -> Any:
        """The next object or list, which is not decoded as a whole."""
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
        try:
            text, left_out = shorten_json(data)
            data.clear()
            value = load_strict(text)
        except json.JSONDecodeError as error:
            raise UnreadableFileError(f"entry {number} is not valid JSON: {error.msg}") from None
        except ValueError as error:
            raise UnreadableFileError(f"entry {number} is not valid JSON: {error}") from None
        return Cut(value, left_out) if left_out else value

    def _read(self, size: int) -> bool:
        """Read on; what was taken is let go. False at the end of the file."""
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
