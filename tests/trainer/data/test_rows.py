"""Rows of every file kind, with their place; layouts recognised; wrong rows explained."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from finetune_api.spec.inputs import DatasetColumns
from finetune_api.vocabulary import DatasetFormat
from finetune_trainer.data.layouts import Conversation, PlainText, detect_format, parse_row
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.rows import read_rows
from finetune_trainer.errors import TrainerError

COLUMNS = DatasetColumns()
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
OPENAI_CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def test_the_same_rows_come_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "completion": 'c "x",\nz'} for number in range(3)]
    files = {
        "a.jsonl": "\n\n".join(map(json.dumps, rows)).encode(),
        "a.json": json.dumps(rows).encode(),
        "a.csv": b"prompt,completion\n" + b"".join(f'p{n},"c ""x"",\nz"\n'.encode() for n in range(3)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert [row.value for row in read_rows((tmp_path / name,))] == rows, name
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.value for row in read_rows((tmp_path / "a.parquet",))] == rows


BROKEN = {
    "half a line": ("rows.jsonl", b'{"text": "a"}\n{"text": ', "rows.jsonl:2"),
    "a key twice": ("rows.jsonl", b'{"text": "a", "text": "b"}', "'text' is written twice"),
    "not UTF-8": ("rows.jsonl", b'{"text": "\xff"}', "rows.jsonl:1"),
    "an object instead of a list": ("rows.json", b'{"text": "a"}', "list of rows"),
    "a short CSV row": ("rows.csv", b"prompt,completion\nalone\n", "rows.csv:2"),
    "another file's bytes": ("rows.parquet", gzip.compress(b"x"), "rows.parquet"),
}


@pytest.mark.parametrize(("name", "content", "part"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_a_broken_row_with_its_place(
    tmp_path: Path, name: str, content: bytes, part: str
) -> None:
    (tmp_path / name).write_bytes(content)
    broken = [row for row in read_rows((tmp_path / name,)) if row.is_broken]
    assert len(broken) == 1
    assert part in f"{broken[0].location}: {broken[0].value}"


LAYOUTS = {
    "messages": ({"messages": [USER, ANSWER]}, DatasetFormat.MESSAGES, Conversation([USER, ANSWER])),
    "prompt and completion": (
        {"prompt": "a", "completion": "b", "text": "unused"},
        DatasetFormat.PROMPT_COMPLETION,
        Conversation([USER, ANSWER], is_continuation=True),
    ),
    "a prompt of messages": (
        {"prompt": [USER], "completion": [ANSWER]},
        DatasetFormat.PROMPT_COMPLETION,
        Conversation([USER, ANSWER]),
    ),
    "an answer of weight 0": (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]},
        DatasetFormat.MESSAGES,
        Conversation([USER, ANSWER, USER, ANSWER], context=frozenset({1})),
    ),
    "a prompt of messages with an answer": (
        {"prompt": [USER, ANSWER, USER], "completion": "b"},
        DatasetFormat.PROMPT_COMPLETION,
        Conversation([USER, ANSWER, USER, ANSWER], context=frozenset({1})),
    ),
    "ShareGPT with a system column and an answer of weight 0": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b", "weight": 0},
                {"from": "gpt", "value": "b"},
            ],
            "system": "s",
        },
        DatasetFormat.SHAREGPT,
        Conversation([{"role": "system", "content": "s"}, USER, ANSWER, ANSWER], context=frozenset({2})),
    ),
    "a prompt about messages": (
        {"prompt": json.dumps([USER]), "completion": "b"},
        DatasetFormat.PROMPT_COMPLETION,
        Conversation([{"role": "user", "content": json.dumps([USER])}, ANSWER], is_continuation=True),
    ),
    "text": ({"text": "abc"}, DatasetFormat.TEXT, PlainText("abc")),
    "messages with tools": (
        {"messages": [USER, ANSWER], "tools": [{"name": "f"}]},
        DatasetFormat.MESSAGES,
        Conversation([USER, ANSWER], [{"type": "function", "function": {"name": "f"}}]),
    ),
    "messages as JSON text": (
        {"messages": json.dumps([USER, ANSWER])},
        DatasetFormat.MESSAGES,
        Conversation([USER, ANSWER]),
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]},
        DatasetFormat.MESSAGES,
        Conversation([USER, ANSWER]),
    ),
    "ShareGPT with a system column": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s", "id": 1},
        DatasetFormat.SHAREGPT,
        Conversation([{"role": "system", "content": "s"}, USER, ANSWER]),
    ),
    "ShareGPT with a call": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "b"},
            ]
        },
        DatasetFormat.SHAREGPT,
        Conversation([USER, CALL, {"role": "tool", "content": "2"}, ANSWER]),
    ),
    "OpenAI's tool calls": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
                {"role": "tool", "content": "2"},
                ANSWER,
            ]
        },
        DatasetFormat.MESSAGES,
        Conversation([USER, CALL, {"role": "tool", "content": "2"}, ANSWER]),
    ),
    "Alpaca": (
        {"instruction": "a", "input": "x", "output": "b", "text": "all of it"},
        DatasetFormat.ALPACA,
        Conversation([{"role": "user", "content": "a\n\nx"}, ANSWER]),
    ),
    "Alpaca without input": ({"instruction": "a", "output": "b"}, DatasetFormat.ALPACA, Conversation([USER, ANSWER])),
}


@pytest.mark.parametrize(("row", "layout", "example"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_are_recognised_and_read(row: dict[str, Any], layout: DatasetFormat, example: object) -> None:
    assert detect_format(row, COLUMNS) is layout
    assert parse_row(row, layout, COLUMNS) == example


def test_columns_may_have_other_names() -> None:
    columns = DatasetColumns(prompt="question", completion="answer")
    row = {"question": "a", "answer": "b"}
    expected = Conversation([USER, ANSWER], is_continuation=True)
    assert parse_row(row, detect_format(row, columns), columns) == expected
    with pytest.raises(TrainerError, match=r"answer, question, but.*columns: {prompt: question, completion: answer}"):
        detect_format(row, COLUMNS)


WRONG: dict[str, tuple[Any, str]] = {
    "no object": ([1], "must be an object"),
    "messages that are no list": ({"messages": "a"}, "must be a list"),
    "no messages": ({"messages": []}, "at least one entry"),
    "a message without role": ({"messages": [{"content": "a"}]}, r"messages\[0\] must be an object with role"),
    "an unknown role": ({"messages": [{"role": "human", "content": "a"}]}, r"messages\[0\].role is 'human'; write"),
    "content that is no text": ({"messages": [{"role": "user", "content": 7}]}, r"messages\[0\].content must be text"),
    "an empty answer": ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"messages\[1\].content is empty"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
        "part of type 'image_url', but models are trained on text",
    ),
    "only weights of zero": ({"messages": [USER, ANSWER | {"weight": 0}]}, "no assistant turn with loss"),
    "another weight": ({"messages": [USER, ANSWER | {"weight": 0.5}]}, r"messages\[1\].weight must be 1 or true, or 0"),
    "arguments that are no JSON": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
        r"messages\[1\].tool_calls\[0\].arguments is text, but not valid JSON",
    ),
    "messages as broken text": ({"messages": "[{"}, "messages is text, but not valid JSON"),
    "tools without name": ({"messages": [USER, ANSWER], "tools": [{}]}, r"tools\[0\] must be an object with name"),
    "no answer": ({"messages": [USER]}, "no assistant turn"),
}


@pytest.mark.parametrize(("row", "pattern"), WRONG.values(), ids=WRONG)
def test_wrong_rows_say_where_and_what_to_write(row: Any, pattern: str) -> None:
    with pytest.raises(BadRowError, match=pattern):
        parse_row(row, DatasetFormat.MESSAGES, COLUMNS)


@pytest.mark.parametrize("value", ["", "  ", None, 3])
def test_empty_texts_are_wrong(value: object) -> None:
    with pytest.raises(BadRowError, match="text"):
        parse_row({"text": value}, DatasetFormat.TEXT, COLUMNS)


def test_reading_is_streamed(tmp_path: Path) -> None:
    """A process that may hold 400 MiB in all reads and checks 256 MiB of rows: what reading itself adds is a row."""
    path = tmp_path / "large.jsonl"
    line = json.dumps({"messages": [USER, {"role": "assistant", "content": "b" * 4000}]}) + "\n"
    with path.open("w") as file:
        for _ in range(64):
            file.write(line * (4 * 2**20 // len(line)))
    code = """
import resource, sys
from pathlib import Path
from finetune_api.spec.inputs import DatasetColumns
from finetune_api.vocabulary import DatasetFormat
from finetune_trainer.data.layouts import parse_row
from finetune_trainer.data.rows import read_rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows, layout = 0, DatasetFormat.MESSAGES
for row in read_rows((Path(sys.argv[1]),)):
    rows += bool(parse_row(row.value, layout, DatasetColumns()))
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    rows, added_mib = done.stdout.split()
    assert int(rows) == 64 * (4 * 2**20 // len(line))
    assert float(added_mib) < 32
