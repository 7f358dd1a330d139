"""Properties of rows that are almost right, which made-up rows hardly ever are, and of the tokens that they become.
The examples are the same in every run."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from finetune_api.failures import FailureReason
from finetune_api.spec.inputs import DatasetColumns
from finetune_api.vocabulary import ChatTemplateName, DatasetFormat, TrainOn
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.labels import IGNORED
from finetune_trainer.chat.templates import SPECIAL_TOKENS, use_named_template
from finetune_trainer.data.layouts import Conversation, PlainText, parse_row
from finetune_trainer.data.messages import ROLES, BadRowError
from finetune_trainer.errors import TrainerError

COLUMNS = DatasetColumns()
MAX_MESSAGE = 400
JsonRow = dict[str, Any]


def fuzz(examples: int) -> settings:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
said = text.map(lambda more: f"é{more}.")  # never blank
calls = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": said, "arguments": st.dictionaries(text, text, max_size=2)})}
)
questions = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool", "developer"]), "content": said})
answers = st.fixed_dictionaries({"role": st.just("assistant"), "content": said}, optional={"weight": st.integers(0, 1)})
calling = st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": st.lists(calls, min_size=1, max_size=2)})
learned = st.fixed_dictionaries({"role": st.just("assistant"), "content": said})
turns = st.tuples(st.lists(questions | answers | calling, max_size=3), learned).map(lambda both: [*both[0], both[1]])
tools = st.lists(st.fixed_dictionaries({"name": said}), max_size=2)
shared = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt"]), "value": said}, optional={"weight": st.integers(0, 1)}
)
ROWS: dict[DatasetFormat, st.SearchStrategy[JsonRow]] = {
    DatasetFormat.MESSAGES: st.fixed_dictionaries({"messages": turns}, optional={"tools": tools}),
    DatasetFormat.SHAREGPT: st.fixed_dictionaries(
        {"conversations": st.lists(shared, max_size=3).map(lambda said: [*said, {"from": "gpt", "value": "a"}])},
        optional={"system": said},
    ),
    DatasetFormat.PROMPT_COMPLETION: st.fixed_dictionaries({"prompt": said | turns, "completion": said}),
    DatasetFormat.ALPACA: st.fixed_dictionaries({"instruction": said, "output": said}, optional={"input": said}),
    DatasetFormat.TEXT: st.fixed_dictionaries({"text": said}),
}
WRONG = [None, True, 0, -1, 1.5, 2**70, "", " ", "[", "[{}]", "{}", "[1]", "a" * 500, [], {}, [None], [[]], {"a": {}}]
DELETED = object()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value inside a row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield (*path, key)
        yield from places(entry, (*path, key))


def damage(row: JsonRow, path: tuple[Any, ...], value: Any) -> JsonRow:
    """The row with another value in that place, or none."""
    row = copy.deepcopy(row)
    holder: Any = row
    for key in path[:-1]:
        holder = holder[key]
    if value is DELETED:
        del holder[path[-1]]
    else:
        holder[path[-1]] = copy.deepcopy(value)
    return row


def parse(row: JsonRow, layout: DatasetFormat) -> tuple[Any, BadRowError | TrainerError | None]:
    try:
        return parse_row(row, layout, COLUMNS), None
    except (BadRowError, TrainerError) as error:
        return None, error


@pytest.mark.parametrize("layout", ROWS)
@fuzz(100)
@given(st.data())
def test_a_row_that_is_right_is_an_example(layout: DatasetFormat, data: st.DataObject) -> None:
    row = data.draw(ROWS[layout])
    example = parse_row(copy.deepcopy(row), layout, COLUMNS)
    if layout is DatasetFormat.TEXT:
        assert example == PlainText(row["text"])
        return
    assert isinstance(example, Conversation)
    if layout is DatasetFormat.MESSAGES:
        unlearned = {index for index, turn in enumerate(row["messages"]) if turn.get("weight", 1) == 0}
        assert example.context == unlearned
        assert [turn["content"] for turn in example.messages] == [turn.get("content", "") for turn in row["messages"]]
    if layout is DatasetFormat.SHAREGPT:
        before = [{"from": "system", "value": row["system"]}] if "system" in row else []
        turns = [*before, *row["conversations"]]
        unlearned = {index for index, turn in enumerate(turns) if turn["from"] == "gpt" and turn.get("weight", 1) == 0}
        assert example.context == unlearned
        assert [turn["content"] for turn in example.messages] == [turn["value"] for turn in turns]


@pytest.mark.parametrize("layout", ROWS)
@fuzz(40)
@given(st.data())
def test_a_row_that_is_wrong_in_any_one_place_is_an_example_or_a_reason(
    layout: DatasetFormat, data: st.DataObject
) -> None:
    """Each place of the row is damaged in every way, so that what is checked does not hang on luck."""
    row = data.draw(ROWS[layout])
    for path in places(row):
        for value in [*WRONG, DELETED]:
            damaged = damage(row, path, value)
            example, problem = parse(damaged, layout)
            if problem is not None:
                assert isinstance(problem, BadRowError) or problem.reason is FailureReason.MISSING_COLUMN
                assert 0 < len(str(problem)) <= MAX_MESSAGE
                assert "a" * 80 not in str(problem), "reasons quote little of a row"
            if isinstance(example, Conversation):
                assert all(turn["role"] in ROLES and isinstance(turn["content"], str) for turn in example.messages)
                spoken = {index for index, turn in enumerate(example.messages) if turn["role"] == "assistant"}
                assert example.context < spoken


@pytest.fixture(scope="module")
def tokenizers(tiny_base: Path) -> dict[ChatTemplateName, Any]:
    """One for each named template, with the special tokens of every family."""
    every = sorted({token for tokens in SPECIAL_TOKENS.values() for token in tokens if token})
    found = {}
    for name in ChatTemplateName:
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": every})
        use_named_template(tokenizer, name)
        found[name] = tokenizer
    return found


spoken = st.lists(
    st.sampled_from(["a", " b", "é", "\n", "  ", "{{ 1 }}", "<|im_end|>", "</s>", "日本", "😀"]), max_size=6
)
chats = st.lists(st.tuples(spoken.map("".join), spoken.map("".join), st.booleans()), min_size=1, max_size=3)


@fuzz(250)
@given(st.sampled_from(list(ChatTemplateName)), st.booleans(), chats)
def test_every_token_of_an_answer_carries_loss_and_no_other(
    tokenizers: dict[ChatTemplateName, Any], name: ChatTemplateName, has_system: bool, said: list[tuple[str, str, bool]]
) -> None:
    """Answers are found in what transformers itself renders, by numbers that occur once."""
    tokenizer = tokenizers[name]
    messages = [{"role": "system", "content": "Be brief."}] if has_system else []
    unlearned = set()
    for number, (question, answer, is_learned) in enumerate(said):
        messages.append({"role": "user", "content": f"Q{number}:{question}?"})
        if not is_learned and number < len(said) - 1:
            unlearned.add(len(messages))
        messages.append({"role": "assistant", "content": f"A{number}:{answer}!"})
    printed = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index not in unlearned:
            whole = message["content"] + tokenizer.eos_token
            assert printed.count(whole) == 1
            spans.append((printed.index(whole), printed.index(whole) + len(whole)))
    encoded = ChatEncoder(tokenizer, TrainOn.RESPONSES).encode(Conversation(messages, context=frozenset(unlearned)))
    assert tokenizer.decode(encoded.input_ids) == printed
    if has_control_tokens(messages):
        harmless = [message | {"content": without_control_tokens(message["content"])} for message in messages]
        expected = tokenizer(tokenizer.apply_chat_template(harmless, tokenize=False), add_special_tokens=False)
        assert count_control_tokens(tokenizer, encoded.input_ids) == count_control_tokens(
            tokenizer, expected["input_ids"]
        )
        learned = [label for label in encoded.labels if label != IGNORED]
        said_at_last = "".join(printed[start:end] for start, end in spans)
        assert tokenizer.decode(learned).replace(" ", "") == said_at_last.replace(" ", "")
        return
    expected = tokenizer(printed, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded.input_ids == expected["input_ids"]
    for label, (start, end) in zip(encoded.labels, expected["offset_mapping"], strict=True):
        is_inside = any(start < last and end > first for first, last in spans)
        is_space_before = any(end == first and printed[start:end] == " " for first, _ in spans)
        assert is_inside == (label != IGNORED) or is_space_before, printed[start:end]


def without_control_tokens(text: str) -> str:
    return text.replace("<|im_end|>", "y").replace("</s>", "y")


def has_control_tokens(messages: list[dict[str, Any]]) -> bool:
    return any(message["content"] != without_control_tokens(message["content"]) for message in messages)


def count_control_tokens(tokenizer: Any, ids: list[int]) -> int:
    return sum(
        tokenizer.added_tokens_decoder[token].special for token in ids if token in tokenizer.added_tokens_decoder
    )
