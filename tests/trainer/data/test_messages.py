"""Messages of every layout: flags of answers, turns that ShareGPT splits, and nulls that libraries fill in."""

from typing import Any

import pytest

from finetune_api.spec.inputs import DatasetColumns
from finetune_api.vocabulary import DatasetFormat
from finetune_trainer.data.layouts import Conversation, detect_format, parse_row
from finetune_trainer.data.messages import Arguments, BadRowError
from finetune_trainer.data.tools import find_undeclared

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
COLUMNS = DatasetColumns()


def parse(row: dict[str, Any]) -> Conversation:
    found = parse_row(row, detect_format(row, COLUMNS), COLUMNS)
    assert isinstance(found, Conversation)
    return found


def in_layout(layout: DatasetFormat, *messages: dict[str, Any]) -> dict[str, Any]:
    """A row of these messages, in OpenAI's names or in ShareGPT's."""
    if layout is DatasetFormat.MESSAGES:
        return {"messages": list(messages)}
    if layout is DatasetFormat.PROMPT_COMPLETION:
        return {"prompt": [messages[0]], "completion": list(messages[1:])}
    names = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    renamed = [
        {names.get(key, key): names.get(value, value) if key == "role" else value for key, value in message.items()}
        for message in messages
    ]
    return {"conversations": renamed}


CHATS = (DatasetFormat.MESSAGES, DatasetFormat.SHAREGPT, DatasetFormat.PROMPT_COMPLETION)
FLAGS = [("weight", 0, 1), ("loss", False, True), ("train", False, True), ("weight", False, 1.0), ("loss", 0, 1)]


@pytest.mark.parametrize("layout", CHATS)
@pytest.mark.parametrize(("name", "off", "on"), FLAGS)
def test_an_answer_whose_flag_is_off_is_context(layout: DatasetFormat, name: str, off: Any, on: Any) -> None:
    found = parse(in_layout(layout, USER, ANSWER | {name: off}, USER, ANSWER | {name: on}, USER, ANSWER))
    assert found == Conversation([USER, ANSWER] * 3, context=frozenset({1})), "and no flag reaches the chat template"


@pytest.mark.parametrize("layout", CHATS)
@pytest.mark.parametrize(("name", "off", "on"), FLAGS)
def test_a_row_whose_every_answer_is_off_is_bad(layout: DatasetFormat, name: str, off: Any, on: Any) -> None:
    with pytest.raises(BadRowError, match="no assistant turn with loss"):
        parse(in_layout(layout, USER, ANSWER | {name: off}, USER, ANSWER | {"weight": 0}))
    assert parse(in_layout(layout, USER, ANSWER | {name: on})).context == frozenset(), "control"


def test_answers_in_a_prompt_are_context_whatever_their_flag() -> None:
    row = {"prompt": [USER, ANSWER | {"loss": True}, USER], "completion": [ANSWER]}
    assert parse(row).context == frozenset({1})


WRONG_FLAGS = [
    ({"weight": 0.5}, "weight must be 1 or true, or 0 or false"),
    ({"loss": "false"}, "loss must be 1 or true, or 0 or false .* is 'false'"),
    ({"train": []}, "train must be"),
    ({"loss": True, "weight": 0}, "weight and loss, which contradict each other"),
]


@pytest.mark.parametrize(("flags", "said"), WRONG_FLAGS)
def test_a_flag_that_says_nothing_is_a_bad_row(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRowError, match=rf"messages\[1\].*{said}"):
        parse({"messages": [USER, ANSWER | flags]})
    agreeing = parse({"messages": [USER, ANSWER | {"loss": True, "weight": 1, "train": None}]})
    assert agreeing == Conversation([USER, ANSWER]), "control"


def said_call(x: int, **more: Any) -> dict[str, Any]:
    return {"from": "function_call", "value": f'{{"name": "area", "arguments": {{"x": {x}}}}}'} | more


def call(x: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "area", "arguments": {"x": x}}}


HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
SEEN, RESULT = {"from": "observation", "value": "25"}, {"role": "tool", "content": "25"}
TURNS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "a text and its call": ([HUMAN, GPT, said_call(5)], [USER, ANSWER | {"tool_calls": [call(5)]}]),
    "two calls": (
        [HUMAN, said_call(5), said_call(6)],
        [USER, {"role": "assistant", "content": "", "tool_calls": [call(5), call(6)]}],
    ),
    "text, calls, observations, text": (
        [HUMAN, GPT, said_call(5), said_call(6), SEEN, SEEN, GPT],
        [USER, ANSWER | {"tool_calls": [call(5), call(6)]}, RESULT, RESULT, ANSWER],
    ),
    "reasoning of either part": (
        [HUMAN, GPT, said_call(5, reasoning_content="r")],
        [USER, ANSWER | {"tool_calls": [call(5)], "reasoning_content": "r"}],
    ),
    "calls of two turns": (
        [HUMAN, said_call(5), SEEN, said_call(6)],
        [
            *(USER, {"role": "assistant", "content": "", "tool_calls": [call(5)]}, RESULT),
            {"role": "assistant", "content": "", "tool_calls": [call(6)]},
        ],
    ),
    "texts in a row, which are turns": ([HUMAN, GPT, GPT], [USER, ANSWER, ANSWER]),
}


@pytest.mark.parametrize(("entries", "messages"), TURNS.values(), ids=TURNS)
def test_a_turn_of_several_sharegpt_entries_is_one_message(
    entries: list[dict[str, Any]], messages: list[dict[str, Any]]
) -> None:
    assert parse({"conversations": entries}) == Conversation(messages)


def test_parts_of_one_turn_agree_on_their_flags() -> None:
    off = parse({"conversations": [HUMAN, GPT | {"loss": False}, said_call(5, loss=False), SEEN, GPT]})
    assert off.context == frozenset({1})
    with pytest.raises(BadRowError, match=r"conversations\[2\] continues the answer before it: give both the same"):
        parse({"conversations": [HUMAN, GPT | {"loss": False}, said_call(5), SEEN, GPT]})
    with pytest.raises(BadRowError, match="both have reasoning_content"):
        parse({"conversations": [HUMAN, said_call(5, reasoning_content="a"), said_call(6, reasoning_content="b")]})


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "default": None}, "unit": {"type": ["string", "null"]}, "x": None},
    "required": ["city", "unit"],
}
TOOL = {"type": "function", "function": {"name": "weather", "strict": None, "parameters": SCHEMA}}


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    asked = {"type": "function", "id": None, "function": {"name": "weather", "arguments": arguments}}
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [asked], "name": None}]} | more


def arguments_of(found: Conversation) -> Arguments:
    arguments = found.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert isinstance(arguments, Arguments)
    return arguments


def test_nulls_that_tables_fill_in_are_left_out_of_tools_and_calls() -> None:
    filled = {"city": "Paris", "unit": None, "x": None, "at": {"hour": 1, "minute": None}, "days": [None, 1]}
    found = parse(calling(filled, tools=[TOOL]))
    assert found.tools == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "unit": {"type": ["string", "null"]}},
                    "required": ["city", "unit"],
                },
            },
        }
    ]
    expected = {"city": "Paris", "unit": None, "at": {"hour": 1}, "days": [None, 1]}
    assert arguments_of(found) == expected, "a null stays where the tool requires the parameter"
    assert found.messages[1]["tool_calls"][0].keys() == {"type", "function"}
    assert arguments_of(parse(calling(filled))) == {key: expected[key] for key in ("city", "at", "days")}


def test_arguments_in_a_text_stay_as_they_were_written() -> None:
    found = arguments_of(parse(calling('{"city":"Paris", "x": null}', tools=[TOOL])))
    assert (found, found.written) == ({"city": "Paris", "x": None}, '{"city":"Paris", "x": null}')
    assert arguments_of(parse(calling({"city": "Paris"}))).written is None
    assert arguments_of(parse(calling(None))) == {}


DECLARED: dict[str, tuple[Any, list[Any] | None, list[str]]] = {
    "an argument of the tool": ({"city": "Paris"}, [TOOL], []),
    "an argument that the tool does not have": ({"city": "Paris", "day": 1}, [TOOL], ["weather.day"]),
    "no tools in the row": ({"day": 1}, None, []),
    "a tool that is not in the row": ({"day": 1}, [{"name": "other", "parameters": None}], ["weather"]),
    "a tool that takes anything": (
        {"day": 1},
        [{"name": "weather", "parameters": {"properties": {}, "additionalProperties": True}}],
        [],
    ),
    "a tool without a schema": ({"day": 1}, [{"name": "weather"}], []),
}


@pytest.mark.parametrize(("arguments", "tools", "expected"), DECLARED.values(), ids=DECLARED)
def test_what_no_tool_declares_is_found(arguments: Any, tools: list[Any] | None, expected: list[str]) -> None:
    found = parse(calling(arguments, tools=tools))
    assert find_undeclared(found.messages, found.tools) == expected
