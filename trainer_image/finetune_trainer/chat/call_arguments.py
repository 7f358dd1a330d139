"""Arguments of calls in the form that a chat template takes: an object, or JSON text. Pure.

Most templates print an object as JSON. Some join the arguments to a text, which fails for an object, or print them as
they are, which writes Python's {'a': 1} for an object: these get the text that the data have.
"""

import json
from collections.abc import Callable
from typing import Any

from finetune_trainer.data.messages import Arguments

PROBE = {"finetune": "probe"}


def write_arguments(arguments: Arguments) -> str:
    """The arguments as JSON text: the data's own, if they have text."""
    return json.dumps(arguments, ensure_ascii=False) if arguments.written is None else arguments.written


def probe_object(_: Arguments) -> dict[str, str]:
    """Arguments to try a template with, as an object."""
    return PROBE


def probe_text(_: Arguments) -> str:
    """The same as JSON text."""
    return json.dumps(PROBE)


def prefers_text(with_object: str | None, with_text: str | None) -> bool | None:
    """True if the template takes text, by what it prints for each probe (None: refused); None if it takes neither."""
    if with_object is not None and repr(PROBE) not in with_object:
        return False
    return True if with_text is not None else None


def with_arguments(messages: list[dict[str, Any]], convert: Callable[[Arguments], Any]) -> list[dict[str, Any]]:
    """The messages with the arguments of every call converted."""
    return [_convert(message, convert) if "tool_calls" in message else message for message in messages]


def _convert(message: dict[str, Any], convert: Callable[[Arguments], Any]) -> dict[str, Any]:
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = function["arguments"]
        known = arguments if isinstance(arguments, Arguments) else Arguments(arguments)
        calls.append(call | {"function": function | {"arguments": convert(known)}})
    return message | {"tool_calls": calls}
