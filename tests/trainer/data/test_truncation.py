"""Truncated texts: what is refused whole is refused truncated, and what is kept is the beginning of what there was."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.spec.inputs import DatasetSpec
from finetune_trainer.data import csv_rows, csv_truncation, json_rows, truncation
from finetune_trainer.data.rows import Row, read_rows
from finetune_trainer.data.strict_json import load_strict
from finetune_trainer.preflight import scan

MAX_CHARACTERS, PIECE = 8, 16
ESCAPES = st.sampled_from(['\\"', "\\\\", "\\n", "\\u00e9", "\\ud83d\\ude00", "\\\\\\\\", "\\\\ud83d"])
WRONG = st.sampled_from(["\\ud83d", "\\ude00", "\\x", "\\u12", "\n", "\x01"])
PLAIN = st.sampled_from(["a", "word ", "é", "\N{GRINNING FACE}", "€", "   ", "[", "{"])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is long beyond 36 bytes, and taken in pieces of 16."""
    monkeypatch.setattr(scan, "MAX_ENCODED_CHARACTERS", MAX_CHARACTERS)
    for module in (truncation, csv_truncation):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE)


def fuzz(examples: int) -> settings:
    quiet = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


def read(path: Path, line: bytes, max_characters: int | None = MAX_CHARACTERS) -> Row:
    path.write_bytes(line)
    (row,) = read_rows((path,), max_characters=max_characters)
    return row


def is_shortened(cut: Any, whole: Any) -> bool:
    """Whether every text is the same, or was truncated to its beginning and is still longer than `MAX_CHARACTERS`."""
    if isinstance(whole, dict):
        return list(cut) == list(whole) and all(is_shortened(cut[key], whole[key]) for key in whole)
    if isinstance(whole, list):
        return len(cut) == len(whole) and all(map(is_shortened, cut, whole))
    if cut == whole or not isinstance(whole, str):
        return bool(cut == whole)
    return (
        len(cut) > MAX_CHARACTERS
        and whole.startswith(cut[: MAX_CHARACTERS + 1])
        and bool(cut.strip()) == bool(whole.strip())
    )


@fuzz(600)
@given(
    st.lists(PLAIN | ESCAPES | WRONG | PLAIN | ESCAPES, max_size=40).map("".join),
    st.lists(PLAIN | ESCAPES, max_size=40).map("".join),
    st.sampled_from([b"", b"\xff", b'", "a": "', b'"', b"\\", b"}"]),
)
def test_a_line_is_valid_truncated_exactly_where_it_is_whole(
    tmp_path: Path, first: str, second: str, odd: bytes
) -> None:
    line = b'{"a": "' + first.encode() + odd + b'", "b": [{"c": "' + second.encode() + b'"}]}'
    cut, whole = (read(tmp_path / "rows.jsonl", line.replace(b"\n", b"\r"), limit) for limit in (MAX_CHARACTERS, None))
    assert cut.is_broken == whole.is_broken, (cut, whole)
    assert whole.is_broken or is_shortened(cut.value, whole.value), (cut, whole)
    assert bool(cut.fingerprint) or cut.value == whole.value or whole.is_broken


@fuzz(600)
@given(
    st.lists(PLAIN | ESCAPES | WRONG | PLAIN | ESCAPES, max_size=40).map("".join),
    st.lists(PLAIN | ESCAPES, max_size=40).map("".join),
    st.sampled_from(["", '"', "}", "]", "{", ", 1", "\\"]),
    st.sampled_from(["[%s]", "%s\n%s", "[%s, %s, {}]", "[%s", '[%s, {"a": ']),
)
def test_a_list_is_valid_truncated_exactly_where_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str, odd: str, form: str
) -> None:
    for name in ("PIECE_BYTES", "LINE_PIECE_BYTES"):
        monkeypatch.setattr(json_rows, name, 2 * PIECE)
    entry = f'{{"a": "{first}"{odd}, "b": [["{second}", {{}}], 1]}}'
    (tmp_path / "rows.json").write_bytes(form.replace("%s", entry.replace("\n", "\r")).encode())
    cut, whole = (list(read_rows((tmp_path / "rows.json",), max_characters=limit)) for limit in (MAX_CHARACTERS, None))
    assert [row.is_broken for row in cut] == [row.is_broken for row in whole], (cut, whole)
    assert all(row.is_broken or is_shortened(short.value, row.value) for short, row in zip(cut, whole, strict=True))


CSV_PIECES = st.sampled_from(
    [
        "a",
        "word ",
        '"',
        '""',
        '"',
        ",",
        ",",
        "\n",
        "\r\n",
        "\r",
        "é",
        "\N{GRINNING FACE}",
        "long words " * 5,
        "\udcff",
        "\t",
    ]
)
LIMIT = 150  # of a field's characters


@fuzz(1500)
@given(st.lists(CSV_PIECES, max_size=30).map("".join), st.booleans())
def test_csv_is_truncated_into_the_rows_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, has_header: bool
) -> None:
    monkeypatch.setattr(csv_rows, "MAX_ROW_BYTES", LIMIT)
    path = tmp_path / "rows.csv"
    path.write_bytes((("a,b\n" if has_header else "") + text).encode(errors="surrogateescape"))
    whole, cut = (list(read_rows((path,), max_characters=limit)) for limit in (None, MAX_CHARACTERS))
    if any("field limit" in str(row.value) for row in whole):
        return  # what follows is read from the middle of the field
    assert [(row.location, row.is_broken) for row in cut] == [(row.location, row.is_broken) for row in whole]
    for short, row in zip(cut, whole, strict=True):
        assert short.value == row.value if row.is_broken else is_shortened(short.value, row.value)
        assert bool(short.fingerprint) == (short.value != row.value)


def test_quotation_marks_and_line_ends_are_not_torn(tmp_path: Path) -> None:
    for length in range(2 * PIECE):
        (tmp_path / "rows.csv").write_bytes(b'a,b\r\n"' + b"x" * length + b'""y\r\n",' + b"x" * length + b"\r\nz,\r\n")
        rows = [row.value for row in read_rows((tmp_path / "rows.csv",), max_characters=MAX_CHARACTERS)]
        assert rows[0]["a"] == "x" * length + '"y\r\n'
        assert rows[1] == {"a": "z", "b": ""}


def test_a_field_beyond_the_limit_is_a_broken_row_and_the_next_row_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_rows, "MAX_ROW_BYTES", LIMIT)
    (tmp_path / "rows.csv").write_text('a,b\n"' + "é\n" * LIMIT + '",x\n1,2\n')
    long, short = read_rows((tmp_path / "rows.csv",), max_characters=MAX_CHARACTERS)
    assert (long.location, long.value) == ("rows.csv:2", "not valid CSV: field larger than field limit (150)")
    assert (short.location, short.value) == (f"rows.csv:{LIMIT + 3}", {"a": "1", "b": "2"})


def test_half_a_pair_behind_what_is_kept_is_found(tmp_path: Path) -> None:
    row = read(tmp_path / "rows.jsonl", b'{"a": "' + b"word " * 40 + b'\\ud83d"}')
    assert row.is_broken
    assert "half of a surrogate pair" in row.value


def test_the_beginning_of_a_text_is_kept_and_a_blank_one_has_words_if_the_text_has(tmp_path: Path) -> None:
    line = json.dumps({"blank": " " * 100, "late": " " * 100 + "word", "long": "ab" * 100}).encode()
    row = read(tmp_path / "rows.jsonl", line)
    assert [bool(row.value[name].strip()) for name in ("blank", "late", "long")] == [False, True, True]
    assert ("ab" * 100).startswith(row.value["long"])
    assert MAX_CHARACTERS < len(row.value["long"]) < 100


def test_json_in_a_text_stays_json(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": 'say "word" ' * 50}, {"role": "assistant", "content": "no"}]
    line = json.dumps({"messages": json.dumps(messages), "text": "[Music] " * 50}).encode()
    row = read(tmp_path / "rows.jsonl", line)
    assert is_shortened(load_strict(row.value["messages"]), messages)
    assert len(row.value["messages"]) < len(json.dumps(messages))
    assert row.value["text"].startswith("[Music] ")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.arrow", "rows.csv"])
def test_long_rows_are_told_apart_by_their_fingerprints(tmp_path: Path, name: str) -> None:
    """Three long rows, of which two are equal and the third differs at its end; the control is truncated as well."""
    rows = [[{"role": "user", "content": "é" * 200 + end}, {"role": "assistant", "content": "b"}] for end in "aab"]
    table = arrow.Table.from_pylist([{"messages": row} for row in rows])
    path = tmp_path / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    elif name.endswith(".json"):
        path.write_text(json.dumps([{"messages": row} for row in rows]))
    elif name.endswith(".parquet"):
        parquet.write_table(table, path)
    elif name.endswith(".csv"):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["messages"], *([json.dumps(row)] for row in rows)])
    else:
        with arrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    read_cut = list(read_rows((path,), max_characters=MAX_CHARACTERS))
    assert all(len(str(row.value)) < 200 for row in read_cut)
    assert [row.fingerprint == read_cut[0].fingerprint for row in read_cut] == [True, True, False]
    found = scan.scan_rows((path,), DatasetSpec.model_validate({"source": "file:///rows"}), None, 64)
    assert (found.rows, found.bad, found.duplicates.duplicates()) == (3, 0, 1)


def test_a_parquet_row_is_truncated_like_a_line(tmp_path: Path) -> None:
    value = {"messages": [{"role": "user", "content": "word " * 20, "none": None}], "more": {"a": ["é" * 50, "b"]}}
    parquet.write_table(arrow.Table.from_pylist([value]), tmp_path / "rows.parquet")
    cut, whole = (
        next(read_rows((tmp_path / "rows.parquet",), max_characters=limit)) for limit in (MAX_CHARACTERS, None)
    )
    assert is_shortened(cut.value, whole.value)
    assert cut.value != whole.value
