"""One schema for the messages of OpenAI, ShareGPT and everything between.

A message is a role and text; tool calls have objects as arguments. ShareGPT writes a turn's text and each of its calls
as entries of their own; they are one message here.

TRL's `maybe_convert_to_chatml` renames from/value only. It keeps roles such as human and gpt, which no template knows,
and arguments as JSON text, which templates would quote a second time.
"""

from typing import Any

from finetune_trainer.data.strict_json import excerpt, load_strict

ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"developer": "system", "function": "tool"}
_SHAREGPT_ALIASES = _ALIASES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")
FLAGS = ("weight", "loss", "train")
"""Keys that say of an answer whether it carries loss."""

KNOWN_KEYS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning"}
)
"""Keys of a message that have a meaning here, without flags; chat templates may know others."""


class BadRowError(ValueError):
    """A row that cannot be used; the message says what was found and what to write."""


class Arguments(dict[str, Any]):
    """A call's arguments as an object, as most templates take them."""

    written: str | None = None
    """The JSON text of the data, for templates that take text; None if the data have an object."""


def parse_messages(value: Any, column: str, *, given: int = 0) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """Messages of a list (or of its JSON text), and indices of the answers without loss.

    An answer has no loss with `weight: 0`, as in OpenAI's format, `loss: false` or `train: false`, or if it is one of
    the first `given` entries. Raises BadRowError with the message's place.
    """
    value = parse_json_text(value, column)
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{column} must be a list of {{role, content}} with at least one entry")

    messages: list[dict[str, Any]] = []
    learns: list[bool] = []
    for index, found in enumerate(value):
        where = f"{column}[{index}]"
        message = _parse_message(found, where)
        is_learned = message["role"] == "assistant" and _pop_flags(message, where) and index >= given

        if messages and messages[-1]["role"] == "assistant" and _is_sharegpt_call(found):
            if is_learned is not learns[-1]:
                raise BadRowError(f"{where} continues the answer before it: give both the same weight, loss or train")
            _join(messages[-1], message, where)
        else:
            messages.append(message)
            learns.append(is_learned)

    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRowError(f"{column} has no assistant turn, so there is nothing to learn")
    if not any(learns):
        raise BadRowError(
            f"{column} has no assistant turn with loss (each has weight: 0, loss: false or train: false), so there is "
            "nothing to learn"
        )
    return messages, frozenset(index for index in answers if not learns[index])


def parse_json_text(value: Any, column: str) -> Any:
    """The list or object that a text holds as JSON, as in files without lists; any other value unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return load_strict(value)
    except ValueError as error:
        raise BadRowError(f"{column} is text, but not valid JSON: {error}") from None


def _parse_message(message: Any, where: str) -> dict[str, Any]:
    """One message in our schema, its flags still in it; `where` is its place, such as messages[2]."""
    if not isinstance(message, dict):
        raise BadRowError(f"{where} must be an object with role and content")

    entry = {key: value for key, value in message.items() if value is not None}
    is_sharegpt = "from" in entry and "role" not in entry
    if is_sharegpt:
        entry = _rename_sharegpt(entry, where)

    if not isinstance(entry.get("role"), str):
        raise BadRowError(f"{where} must be an object with role and content")
    entry["role"] = (_SHAREGPT_ALIASES if is_sharegpt else _ALIASES).get(entry["role"], entry["role"])
    if entry["role"] not in ROLES:
        raise BadRowError(f"{where}.role is {excerpt(entry['role'])}; write {', '.join(ROLES[:-1])} or {ROLES[-1]}")

    # OpenAI's older form has one call, `function_call`, in place of a list.
    if isinstance(legacy := entry.pop("function_call", None), dict):
        entry["tool_calls"] = [legacy]
    if calls := entry.pop("tool_calls", None):
        entry["tool_calls"] = _parse_calls(calls, f"{where}.tool_calls")

    entry["content"] = _parse_content(entry, where)
    return entry


def _rename_sharegpt(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """A ShareGPT message with `role` and `content` for `from` and `value`; a call becomes the assistant's."""
    renamed = {{"from": "role", "value": "content"}.get(key, key): value for key, value in entry.items()}
    if renamed["role"] not in CALLS:
        return renamed
    call = parse_json_text(renamed.get("content"), f"{where}.value")
    return renamed | {"role": "assistant", "content": "", "tool_calls": call if isinstance(call, list) else [call]}


def _is_sharegpt_call(message: dict[str, Any]) -> bool:
    return "role" not in message and message.get("from") in CALLS


def _pop_flags(message: dict[str, Any], where: str) -> bool:
    """True if the answer carries loss, by its flags, which are taken out of it. Raises BadRowError."""
    if message.keys().isdisjoint(FLAGS):
        return True

    flags = {name: message.pop(name) for name in FLAGS if name in message}
    for name, value in flags.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRowError(
                f"{where}.{name} must be 1 or true, or 0 or false for an answer that is only context, but is "
                f"{excerpt(value)}"
            )

    if len({bool(value) for value in flags.values()}) > 1:
        raise BadRowError(f"{where} has {' and '.join(flags)}, which contradict each other: keep one of them")
    return all(flags.values())


def _join(turn: dict[str, Any], call: dict[str, Any], where: str) -> None:
    """Adds a ShareGPT call to the turn of the assistant that it continues: a text, or calls made in parallel."""
    turn["tool_calls"] = [*turn.get("tool_calls", ()), *call["tool_calls"]]
    for key in call.keys() - {"role", "content", "tool_calls"}:
        if turn.setdefault(key, call[key]) != call[key]:
            raise BadRowError(f"{where} continues the answer before it, but both have {key}: join them in the first")


def _parse_content(entry: dict[str, Any], where: str) -> str:
    """A message's text; parts of text are joined."""
    content = entry.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if other := [part for part in content if not isinstance(part.get("text"), str)]:
            kind = excerpt(other[0].get("type"))
            raise BadRowError(
                f"{where}.content has a part of type {kind}, but models are trained on text alone: replace it by "
                '{"type": "text", "text": "..."} that says what it shows, or leave the row out'
            )
        content = "".join(part["text"] for part in content)

    # An answer that only calls tools has no text.
    if content is None and "tool_calls" in entry:
        content = ""
    if not isinstance(content, str):
        raise BadRowError(f"{where}.content must be text, but is a {type(content).__name__}")
    if entry["role"] == "assistant" and "tool_calls" not in entry and not content.strip():
        raise BadRowError(f"{where}.content is empty: there is nothing to learn from an empty answer")
    return content


def _parse_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects."""
    if not isinstance(calls, list):
        raise BadRowError(f"{where} must be a list, but is a {type(calls).__name__}")

    parsed = []
    for index, call in enumerate(calls):
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f"{where}[{index}] must be an object with a function's name and arguments")

        arguments = _parse_arguments(function.get("arguments"), f"{where}[{index}].arguments")
        extra = {"id": call["id"]} if call.get("id") is not None else {}
        parsed.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}} | extra)
    return parsed


def _parse_arguments(value: Any, where: str) -> Arguments:
    found = {} if value is None else parse_json_text(value, where)
    if not isinstance(found, dict):
        raise BadRowError(f"{where} must be an object or its JSON text")

    arguments = Arguments(found)
    arguments.written = value if isinstance(value, str) else None
    return arguments
