"""Jinja as chat templates expect it: the sandbox, tags, filters and globals that transformers gives them.

Written here again because transformers keeps its own private, joins all text so far at every mark (quadratic in a
conversation's length), and reads the clock anew at each rendering. A test compares the two over every template that TRL
carries.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from finetune_trainer.chat.sandbox.reasoning import REASONING


class MisplacedMarkError(TemplateError):
    """A {% generation %} mark that stands where it does not print: in a macro, or in a {% set %} block."""


class ChatTemplate:
    """One compiled template. Compiling raises TemplateError, or what Python's compiler raises, for a wrong one."""

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        """`variables`: the tokenizer's special tokens by name."""
        self._environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._template = self._environment.from_string(source)
        self._variables = variables

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any) -> str:
        """The text that the template prints. May raise anything that Jinja and Python's built-in types raise."""
        return self.render_marked(messages, tools, **options)[0]

    def render_marked(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the characters [start, end) of each part between {% generation %} and {% endgeneration %}."""
        self._environment.begin()
        chat = [_name_reasoning(message) for message in messages]
        values = {**self._variables, "messages": chat, "tools": tools, "documents": None}

        # The number of characters printed so far tells a mark where it starts.
        pieces = []
        for piece in self._template.generate({"add_generation_prompt": False} | values | options):
            pieces.append(piece)
            self._environment.written += len(piece)

        text = "".join(pieces)
        for start, printed in self._environment.marked:
            if text[start : start + len(printed)] != printed:
                raise MisplacedMarkError(
                    "{% generation %} stands in a macro or a {% set %} block, where it marks nothing"
                )

        return text, [(start, start + len(printed)) for start, printed in self._environment.marked if printed]

    def freeze_time(self) -> None:
        """Makes every rendering from now on print the same time."""
        self._environment.now = datetime.now()  # noqa: DTZ005


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which counts the characters that are printed."""

    written = 0
    now = datetime.now()  # noqa: DTZ005 (templates print the local date)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.marked: list[tuple[int, str]] = []
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda layout: self.now.strftime(layout),
            "dict": _Dictionary(),
            "namespace": _Namespace,
        }

    def begin(self) -> None:
        """Forgets the last rendering."""
        self.written, self.marked = 0, []


class _Generation(Extension):
    """The tags {% generation %} ... {% endgeneration %} around what the model says."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser: Parser) -> nodes.Node:
        """Turns the block into a call of `_mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        environment = self.environment
        assert isinstance(environment, _Environment)
        start, printed = environment.written, caller()
        environment.marked.append((start, printed))
        return printed


class _Dictionary:
    """A stand-in for `dict`, as the class's attributes lead out of the sandbox."""

    def __call__(self, *entries: Any, **named: Any) -> dict[Any, Any]:
        return dict(*entries, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        """The same as dict.fromkeys."""
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    """A `namespace` that refuses names which Python itself uses."""

    def __init__(*arguments: Any, **named: Any) -> None:  # an entry may be called self
        own, *entries = arguments
        values = dict(*entries, **named)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Writes JSON without Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _name_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message without nulls, and with its reasoning under the names that templates know."""
    entry = {key: value for key, value in message.items() if value is not None}
    reasoning = next((entry[name] for name in REASONING if name in entry), None)
    return entry if reasoning is None else {"thinking": reasoning, **entry, "reasoning_content": reasoning}
