"""One schema for the messages of OpenAI, ShareGPT and everything between.

A message is a role and text; tool calls have objects as arguments; tools are {type: function, function: {name, ...}}.

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


class BadRowError(ValueError):
    """A row that cannot be used; the message says what was found and what to write."""


def parse_messages(value: Any, column: str) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """Messages of a list (or of its JSON text), and indices of the answers without loss.

    An answer has no loss with `weight: 0`, as in OpenAI's format. Raises BadRowError with the message's place.
    """
    value = parse_json_text(value, column)
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{column} must be a list of {{role, content}} with at least one entry")

    messages = [_parse_message(message, f"{column}[{index}]") for index, message in enumerate(value)]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRowError(f"{column} has no assistant turn, so there is nothing to learn")

    weights = [message.pop("weight", 1) for message in messages]
    context = frozenset(index for index in answers if not weights[index])
    if len(context) == len(answers):
        raise BadRowError(f"{column} has no assistant turn with weight 1, so there is nothing to learn")
    return messages, context


def parse_tools(value: Any, column: str) -> list[Any] | None:
    """Tools in the form that templates print; None if there are none. Raises BadRowError."""
    value = parse_json_text(value, column)
    if value in (None, [], ""):
        return None
    if not isinstance(value, list):
        raise BadRowError(f"{column} must be a list of tools, but is a {type(value).__name__}")

    tools = []
    for index, tool in enumerate(value):
        # Some data sets list bare functions.
        wrapped = tool if isinstance(tool, dict) and "function" in tool else {"type": "function", "function": tool}
        function = wrapped["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f"{column}[{index}] must be an object with name and parameters")
        tools.append(wrapped)
    return tools


def parse_json_text(value: Any, column: str) -> Any:
    """The list or object that a text holds as JSON, as in files without lists; any other value unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return load_strict(value)
    except ValueError as error:
        raise BadRowError(f"{column} is text, but not valid JSON: {error}") from None


def _parse_message(message: Any, where: str) -> dict[str, Any]:
    """One message in our schema, `weight` still in it; `where` is its place, such as messages[2]."""
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
    if entry.get("weight", 1) not in (0, 1):
        raise BadRowError(f"{where}.weight must be 1, or 0 for an answer that is only context")

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
    return {"role": "assistant", "content": "", "tool_calls": call if isinstance(call, list) else [call]}


def _parse_content(entry: dict[str, Any], where: str) -> str:
    """A message's text; parts of text are joined."""
    content = entry.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if other := [part for part in content if not isinstance(part.get("text"), str)]:
            kind = excerpt(other[0].get("type"))
            raise BadRowError(f"{where}.content has a part of type {kind}, but only text is supported")
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
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f"{where}[{index}] must be an object with a function's name and arguments")

        arguments = parse_json_text(function.get("arguments", {}), f"{where}[{index}].arguments")
        if not isinstance(arguments, dict):
            raise BadRowError(f"{where}[{index}].arguments must be an object or its JSON text")

        extra = {"id": call["id"]} if "id" in call else {}
        parsed.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}} | extra)
    return parsed
