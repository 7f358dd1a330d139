"""Every layout in every kind of file is the same example, one file at a time and all kinds in one folder."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from pyarrow import ipc

from finetune_api.spec.inputs import DatasetColumns
from finetune_api.vocabulary import DatasetFormat
from finetune_trainer.data.layouts import Conversation, PlainText, describe_detection, detect_format, parse_row
from finetune_trainer.data.rows import DATA_SUFFIXES, read_rows
from finetune_trainer.sources import SourceAccess, fetch_dataset
from finetune_trainer.storage.object_store import ignore_bytes

Rows = list[dict[str, Any]]
SYSTEM = {"role": "system", "content": "Be brief."}
USER, ANSWER = {"role": "user", "content": 'é, "a"\n,\tb'}, {"role": "assistant", "content": "Four.\n"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
OPENAI_CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TURNS = [SYSTEM, USER, ANSWER, USER, ANSWER]

LAYOUTS: dict[str, tuple[dict[str, Any], DatasetFormat, Any]] = {
    "OpenAI messages": ({"messages": TURNS}, DatasetFormat.MESSAGES, Conversation(TURNS)),
    "messages with a weight": (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]},
        DatasetFormat.MESSAGES,
        Conversation([USER, ANSWER, USER, ANSWER], context=frozenset({1})),
    ),
    "messages with tools": (
        {
            "messages": [USER, {"role": "assistant", "tool_calls": [OPENAI_CALL]}, RESULT, ANSWER],
            "tools": [TOOL],
        },
        DatasetFormat.MESSAGES,
        Conversation([USER, CALLING, RESULT, ANSWER], [TOOL]),
    ),
    "messages in parts": (
        {"messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in (USER, ANSWER)]},
        DatasetFormat.MESSAGES,
        Conversation([USER, ANSWER]),
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": USER["content"]},
                {"from": "gpt", "value": ANSWER["content"]},
            ],
            "system": SYSTEM["content"],
        },
        DatasetFormat.SHAREGPT,
        Conversation([SYSTEM, USER, ANSWER]),
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "2 + 2", "output": ANSWER["content"]},
        DatasetFormat.ALPACA,
        Conversation([{"role": "user", "content": "Add.\n\n2 + 2"}, ANSWER]),
    ),
    "prompt and completion": (
        {"prompt": USER["content"], "completion": ANSWER["content"]},
        DatasetFormat.PROMPT_COMPLETION,
        Conversation([USER, ANSWER], is_continuation=True),
    ),
    "prompt and completion as messages": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        DatasetFormat.PROMPT_COMPLETION,
        Conversation([SYSTEM, USER, ANSWER]),
    ),
    "text": ({"text": USER["content"]}, DatasetFormat.TEXT, PlainText(USER["content"])),
}


def lines(rows: Rows) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def separated(delimiter: str) -> Callable[[Rows], bytes]:
    """Lists as JSON text, as tables have no lists."""

    def write(rows: Rows) -> bytes:
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in row.values()])
        return file.getvalue().encode()

    return write


def zstd(content: bytes) -> bytes:
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def parquet_file(rows: Rows) -> bytes:
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def arrow_file(opened: Any) -> Callable[[Rows], bytes]:
    def write(rows: Rows) -> bytes:
        sink, table = arrow.BufferOutputStream(), arrow.Table.from_pylist(rows)
        with opened(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    return write


PLAIN: dict[str, Callable[[Rows], bytes]] = {
    ".jsonl": lines,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": separated(","),
    ".tsv": separated("\t"),
}
KINDS = {f"rows{suffix}": write for suffix, write in PLAIN.items()}
KINDS |= {f"rows{suffix}.gz": lambda rows, write=write: gzip.compress(write(rows)) for suffix, write in PLAIN.items()}
KINDS |= {f"rows{suffix}.zst": lambda rows, write=write: zstd(write(rows)) for suffix, write in PLAIN.items()}
KINDS |= {
    "rows.parquet": parquet_file,
    "file.arrow": arrow_file(ipc.new_file),
    "rows.arrow": arrow_file(ipc.new_stream),
}


def test_every_kind_of_file_is_in_the_table() -> None:
    assert {name[name.index(".") :] for name in KINDS} == set(DATA_SUFFIXES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_layout_in_a_kind_of_file(tmp_path: Path, name: str, layout: str) -> None:
    row, kind, example = LAYOUTS[layout]
    (tmp_path / name).write_bytes(KINDS[name]([row, row]))
    found = list(read_rows((tmp_path / name,)))
    assert [detect_format(row.value, DatasetColumns()) for row in found] == [kind, kind]
    assert [parse_row(row.value, kind, DatasetColumns()) for row in found] == [example, example]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_have_any_name(layout: str) -> None:
    row, kind, example = LAYOUTS[layout]
    renamed = {f"my {name}": value for name, value in row.items()}
    columns = DatasetColumns.model_validate({name: f"my {name}" for name in row})
    assert detect_format(renamed, columns) is kind
    assert parse_row(renamed, kind, columns) == example
    assert describe_detection(renamed | {"id": 1}, kind, columns).endswith("; not used: id")


def test_a_folder_of_every_kind_is_one_dataset(tmp_path: Path) -> None:
    row, kind, example = LAYOUTS["messages with tools"]
    for number, (name, write) in enumerate(KINDS.items()):
        path = tmp_path / "data" / f"part-{number}" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(write([row]))
    (tmp_path / "data/README.md").write_text("no data")
    found = fetch_dataset(f"file://{tmp_path}/data/", "train", tmp_path / "work", SourceAccess(), ignore_bytes)
    examples = [parse_row(row.value, kind, DatasetColumns()) for row in read_rows(found.files)]
    assert examples == [example] * len(KINDS)
