"""Every template that TRL carries prints here what it prints in transformers, marks included."""

from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from finetune_trainer.chat.sandbox.environment import ChatTemplate, MisplacedMarkError

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
USER, ANSWER = {"role": "user", "content": " 2 + 2?"}, {"role": "assistant", "content": "Four. é"}
THOUGHT = {"role": "assistant", "content": "Six.", "reasoning": "3 + 3"}
CHATS = {
    "two turns": ([USER, ANSWER, USER, ANSWER], None),
    "with a system turn and reasoning": ([{"role": "system", "content": "Be brief."}, USER, THOUGHT], None),
    "with tools": (
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "4"},
            ANSWER,
        ],
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    ),
}


def theirs(source: str, messages: list[Any], tools: Any) -> Any:
    options: Any = VARIABLES
    try:
        texts, marks = render_jinja_template(
            [messages], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **options
        )
    except (TemplateError, TypeError) as error:
        return type(error)
    return texts[0], [tuple(mark) for mark in marks[0] if mark[1] > mark[0]]


def ours(source: str, messages: list[Any], tools: Any) -> Any:
    template = ChatTemplate(source, VARIABLES)
    template.freeze_time()
    try:
        return template.render_marked(messages, tools)
    except (TemplateError, TypeError) as error:
        return type(error)


@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_the_same_is_printed_and_marked(path: Path) -> None:
    source = path.read_text()
    for messages, tools in CHATS.values():
        assert ours(source, messages, tools) == theirs(source, messages, tools)


def test_most_templates_print_something() -> None:
    printed = [ours(path.read_text(), *CHATS["two turns"]) for path in TEMPLATES]
    assert sum(isinstance(result, tuple) for result in printed) > 0.9 * len(TEMPLATES) - 5


def test_a_mark_where_nothing_is_printed_is_refused() -> None:
    template = ChatTemplate("ab{% set x %}{% generation %}c{% endgeneration %}{% endset %}{{ x }}{{ x }}", {})
    assert template.render([], None) == "abcc", "the second is where the mark says, by chance"
    template = ChatTemplate("{% set x %}{% generation %}c{% endgeneration %}{% endset %}ab{{ x }}", {})
    with pytest.raises(MisplacedMarkError, match="where it marks nothing"):
        template.render([], None)
