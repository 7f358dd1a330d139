"""Tools in one form for every layout, and calls compared with them. Pure.

Libraries that keep rows in tables give every object the keys of all others, with null for what it does not have. Such
nulls are left out of tools and of calls, or the model would read and write them.
"""

from collections.abc import Iterator
from typing import Any

from finetune_trainer.data.messages import Arguments, BadRowError, parse_json_text
from finetune_trainer.data.strict_json import without_nulls


def parse_tools(value: Any, column: str) -> list[Any] | None:
    """Tools in the form that templates print; None if there are none. Raises BadRowError."""
    value = without_nulls(parse_json_text(value, column))
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


def leave_out_nulls(messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
    """Takes null arguments out of calls, except where the tool requires the parameter: a null is its value then.

    Arguments that the data hold as JSON text stay as their author wrote them.
    """
    for function in _called(messages):
        arguments: Arguments = function["arguments"]
        if arguments.written is None:
            required = _schema(tools, function["name"]).get("required") or ()
            kept = {name: value for name, value in arguments.items() if value is not None or name in required}
            function["arguments"] = Arguments({name: without_nulls(value) for name, value in kept.items()})


def find_undeclared(messages: list[dict[str, Any]], tools: list[Any] | None) -> list[str]:
    """Names of what is called although the row's tools do not declare it: a tool, or tool.argument."""
    if not tools:
        return []

    declared = {tool["function"]["name"] for tool in tools}
    found = []
    for function in _called(messages):
        name, schema = function["name"], _schema(tools, function["name"])
        if name not in declared:
            found.append(name)
        elif isinstance(schema.get("properties"), dict) and not schema.get("additionalProperties"):
            found += [
                f"{name}.{argument}" for argument in function["arguments"] if argument not in schema["properties"]
            ]
    return found


def _called(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Name and arguments of every call."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            yield call["function"]


def _schema(tools: list[Any] | None, name: str) -> dict[str, Any]:
    """The schema of a tool's parameters; empty without one."""
    functions = (tool["function"] for tool in tools or ())
    found = next((function.get("parameters") for function in functions if function["name"] == name), None)
    return found if isinstance(found, dict) else {}
