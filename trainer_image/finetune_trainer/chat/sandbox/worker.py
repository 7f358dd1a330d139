"""The process that renders templates: `python -I -m finetune_trainer.chat.sandbox.worker SECONDS MEBIBYTES`.

Jinja's sandbox keeps a template from Python's inside, but not from `'a' * 10**10` or loops within loops; the limits of
this process do. It has no environment, so no credentials, and can open no file and no socket: a way out of the sandbox
leads nowhere.

Requests and answers are a length of eight bytes and JSON. The first request, and any other with a `template`, sets the
template for itself and the rows that follow.
"""

import contextlib
import json
import math
import resource
import sys
import time
from typing import Any, BinaryIO

from jinja2 import TemplateError

from finetune_trainer.chat.sandbox.environment import ChatTemplate
from finetune_trainer.chat.sandbox.marks import UnprintedAnswerError
from finetune_trainer.chat.sandbox.spans import AnswerFinder, UnknownSpansError

LENGTH_BYTES = 8
READY = b"{}"
"""The first answer, before any request: an end before it is no row's fault."""
SHOWN_CHARACTERS = 300

# A text may have this many characters, and so many times the request's bytes on top.
PRINTED_FREELY = 16 * 2**20
PRINTED_TIMES = 4

# Errors that a stranger's template can raise; attempts to leave the sandbox are TemplateErrors.
ROW_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


def main() -> int:
    """Serves until the parent closes the pipe; returns the exit code."""
    seconds = int(sys.argv[1])
    confine(int(sys.argv[2]))
    state = _State()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer

    _send(answers, READY)
    try:
        while (length := int.from_bytes(requests.read(LENGTH_BYTES), "big")) > 0:
            # The limit counts CPU time from the process's start, so it moves on with each row.
            limit = math.ceil(time.process_time()) + seconds
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            answer = state.answer(json.loads(requests.read(length)), length)
            _send(answers, json.dumps(answer, ensure_ascii=False).encode())
    except MemoryError:
        return 1  # the parent starts another
    return 0


def confine(mebibytes: int) -> None:
    """Takes from this process what rendering does not need: memory, files, sockets."""
    for source in ("{{ messages | tojson }}{{ strftime_now('%d %B %Y') }}", "{{ messages[0].x }}", "{% if %}"):
        with contextlib.suppress(*ROW_ERRORS):  # makes Python and Jinja load what they load late, for errors too
            template = ChatTemplate(source, {})
            template.freeze_time()
            template.render([], None)

    resource.setrlimit(resource.RLIMIT_AS, (mebibytes * 2**20, mebibytes * 2**20))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class _State:
    """The template in use."""

    def __init__(self) -> None:
        self._template: ChatTemplate | None = None
        self._finder: AnswerFinder | None = None
        self._problem = ""

    def answer(self, request: dict[str, Any], length: int) -> dict[str, Any]:
        """The answer to one request of `length` bytes: the text and its answers, or an error."""
        if (source := request.get("template")) is not None:
            self._use(source, request["variables"], request["special"])
        if self._template is None or self._finder is None:
            return {"error": "template", "message": self._problem}

        self._template.freeze_time()
        try:
            answer = self._render(self._template, self._finder, request)
        except UnprintedAnswerError as error:
            return {"error": "unprinted", "message": str(error)}
        except UnknownSpansError:
            return {"error": "spans"}
        except ROW_ERRORS as error:
            return {"error": "row", "message": _first_line(error)}

        if len(answer["text"]) > PRINTED_FREELY + PRINTED_TIMES * length:
            return {"error": "memory"}
        return answer

    def _render(self, template: ChatTemplate, finder: AnswerFinder, request: dict[str, Any]) -> dict[str, Any]:
        messages, tools = request["messages"], request["tools"]
        if not request["spans"] and not request["reasoning"]:
            text = template.render(messages, tools, add_generation_prompt=request["asked"])
            return {"text": text, "spans": [], "reasoning": []}

        found = finder.find(messages, tools, spans=request["spans"])
        return {"text": found.text, "spans": found.spans, "reasoning": list(found.reasoning.items())}

    def _use(self, source: str, variables: dict[str, Any], special: list[str]) -> None:
        """Compiles a template for the rows from now on; keeps the problem of one that is wrong."""
        self._template = self._finder = None
        try:
            self._template = ChatTemplate(source, variables)
        except (*ROW_ERRORS, SyntaxError) as error:
            self._problem = _first_line(error)
            return
        self._finder = AnswerFinder(self._template, special)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:SHOWN_CHARACTERS]


def _send(stream: BinaryIO, data: bytes) -> None:
    stream.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
