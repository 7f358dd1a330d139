"""Properties that hold for whatever hypothesis makes up: of the row parser (any bytes, any JSON, any row) and of the
template renderer (any template, any conversation). The examples are the same in every run."""

import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.failures import FailureReason
from finetune_api.spec.inputs import DatasetColumns
from finetune_api.vocabulary import ChatTemplateName, DatasetFormat
from finetune_trainer.chat.sandbox.environment import ChatTemplate
from finetune_trainer.chat.sandbox.marks import MARK
from finetune_trainer.chat.sandbox.process import LimitError, RenderingLimits, RenderingProcess, TemplateSetup
from finetune_trainer.chat.sandbox.spans import AnswerFinder
from finetune_trainer.chat.templates import load_template
from finetune_trainer.data.layouts import LAYOUTS, Conversation, detect_format, parse_row
from finetune_trainer.data.messages import ROLES, BadRowError
from finetune_trainer.data.rows import DATA_SUFFIXES, Row, read_rows
from finetune_trainer.errors import TrainerError

MAX_MESSAGE = 400
EXCERPT = 80
COLUMNS = DatasetColumns()


def fuzz(examples: int) -> settings:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
leaves = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | text
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)
rows = st.lists(st.dictionaries(text, values, max_size=4), min_size=1, max_size=5)


def read(suffix: str, content: bytes) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(content)
        return list(read_rows((path,)))


# Bytes that look like files: pieces of JSON, CSV and of the formats' own marks.
PIECES = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\r", b"\\", b"\\ud800", b"\x00", b"\xff", b"\xef\xbb\xbf"]
PIECES += [
    b'{"a": 1}',
    b"NaN",
    b"-1e999",
    b"PAR1",
    b"ARROW1\x00\x00",
    b"\xff\xff\xff\xff",
    b"1" * 5000,
    b"\x1f\x8b\x08",
]
contents = st.lists(st.sampled_from(PIECES) | st.binary(max_size=8), max_size=12).map(b"".join)


@fuzz(400)
@given(st.sampled_from(DATA_SUFFIXES), contents, st.booleans())
def test_any_bytes_are_rows_or_reasons(suffix: str, content: bytes, packed: bool) -> None:
    for row in read(suffix, gzip.compress(content) if packed and suffix.endswith(".gz") else content):
        assert row.location.startswith("a.")
        assert not row.is_broken or 0 < len(row.value) <= MAX_MESSAGE


@fuzz(150)
@given(rows, st.integers(0, 300), st.integers(0, 255))
def test_a_damaged_parquet_file_is_rows_or_reasons(table: list[dict[str, Any]], at: int, byte: int) -> None:
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.table({"a": [json.dumps(row) for row in table]}), sink)
    content = bytearray(bytes(sink.getvalue()))
    content[-1 - at % len(content)] = byte
    for row in read(".parquet", bytes(content)):
        assert not row.is_broken or 0 < len(row.value) <= MAX_MESSAGE


@fuzz(150)
@given(rows, st.booleans())
def test_what_is_written_is_read_again(table: list[dict[str, Any]], ascii_only: bool) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in table).encode()
    whole = json.dumps(table, ensure_ascii=ascii_only, indent=1).encode()
    files = [(".jsonl", lines), (".json", whole), (".jsonl.gz", gzip.compress(lines))]
    if len(table) > 1:  # one object is refused: a .json file holds a list
        files.append((".json", lines))
    for suffix, content in files:
        assert [row.value for row in read(suffix, content)] == table, suffix


names = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "output",
    "text",
    "tools",
    "system",
    "input",
]
keys = [
    "role",
    "content",
    "from",
    "value",
    "weight",
    "tool_calls",
    "function_call",
    "function",
    "name",
    "arguments",
    "type",
]
words = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "[{", "{}", "a" * 500])
parts = st.recursive(
    leaves | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(keys), inner, max_size=5),
    max_leaves=12,
)


def parse(row: dict[str, Any], layout: DatasetFormat) -> tuple[Any, BadRowError | TrainerError | None]:
    try:
        detect_format(row, COLUMNS)
        return parse_row(row, layout, COLUMNS), None
    except (BadRowError, TrainerError) as error:
        return None, error


@fuzz(600)
@given(st.dictionaries(st.sampled_from(names) | words, parts, max_size=5), st.sampled_from(LAYOUTS))
def test_any_row_is_an_example_or_a_reason(row: dict[str, Any], layout: DatasetFormat) -> None:
    example, problem = parse(row, layout)
    if problem is not None:
        assert isinstance(problem, BadRowError) or problem.reason is FailureReason.MISSING_COLUMN
        assert len(str(problem)) <= MAX_MESSAGE
        assert "a" * EXCERPT not in str(problem), "messages name places, and quote little"
    if isinstance(example, Conversation):
        assert all(message["role"] in ROLES and isinstance(message["content"], str) for message in example.messages)
        answers = {index for index, message in enumerate(example.messages) if message["role"] == "assistant"}
        assert example.context < answers


# Own templates of families, and ours; each with what follows an answer and what may stand in front of it.
QWEN3 = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text()
TEMPLATES = {
    "qwen3": (QWEN3, "<|im_end|>"),
    "llama3": (load_template(ChatTemplateName.LLAMA3), "<|eot_id|>"),
    "unmarked": (
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        "<|im_end|>",
    ),
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<s>", "</s>"]
said = st.lists(
    st.sampled_from(["a", "é", " ", "\n", "{{ 1 }}", "\uf8d1", *SPECIAL[:2]]) | text, min_size=1, max_size=5
)
said_text = (
    said.map("".join)
    .map(str.strip)
    .filter(lambda content: content and "think>" not in content and not MARK.search(content))
)


@fuzz(300)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(said_text, said_text), min_size=1, max_size=4))
def test_supervised_text_is_the_answers_and_their_ends(name: str, turns: list[tuple[str, str]]) -> None:
    source, end = TEMPLATES[name]
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    printed, spans = AnswerFinder(ChatTemplate(source, {"bos_token": "<s>"}), SPECIAL).find(messages, None)[:2]
    found = [printed[start:stop].removeprefix("<think>\n\n</think>\n\n") for start, stop, _ in spans]
    assert found == [answer + end for _, answer in turns]


PROGRAM = [
    "{{ ",
    " }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if ",
    " %}",
    "{% endif %}",
    "{% set x = ",
    "x",
    "m",
]
PROGRAM += [
    "messages",
    ".content",
    "['role']",
    "|",
    " ~ ",
    " + ",
    " * ",
    "'a'",
    "9999999",
    "tojson",
    "list",
    "trim",
    "join",
]
PROGRAM += [
    "range(99999)",
    "{% generation %}",
    "{% endgeneration %}",
    "(",
    ")",
    "[",
    "]",
    ".__class__",
    "namespace(",
    "{#",
    "#}",
]
PROGRAM += [
    "{% macro f() %}",
    "{% endmacro %}",
    "f()",
    "raise_exception(",
    "tools",
    "add_generation_prompt",
    "center(",
    "-%}",
]
programs = st.lists(st.sampled_from(PROGRAM), max_size=25).map("".join) | st.text(max_size=30)
ERRORS = {"row", "template", "unprinted", "spans"}


@pytest.fixture(scope="module")
def process() -> Iterator[RenderingProcess]:
    started = RenderingProcess(RenderingLimits(seconds=1, mebibytes=512))
    yield started
    started.close()


@fuzz(400)
@given(programs, said_text)
def test_any_template_prints_or_has_a_reason(process: RenderingProcess, source: str, answer: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    try:
        result = process.ask(
            TemplateSetup(source, {}, ()),
            {"messages": messages, "tools": None, "spans": True, "reasoning": False, "asked": False},
        )
    except LimitError:
        return
    if "error" in result:
        assert result["error"] in ERRORS
        assert len(result.get("message", "")) <= MAX_MESSAGE
        return
    places = [(start, end) for start, end, _ in result["spans"]]
    assert all(0 <= start <= end <= len(result["text"]) for start, end in places)
