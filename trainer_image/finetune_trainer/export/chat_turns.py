"""What a chat template writes between the messages, found by rendering it.

Ollama has a template language of its own, and a Jinja template cannot be translated in general. But those of nearly
all families (ChatML and Qwen, Llama 3, Mistral, Gemma, Phi, Zephyr, ...) only put fixed text between the messages of
a conversation. That text is found by rendering conversations of known content, and then compared with the template on
longer ones; a template that does more (answers rewritten, the system message moved) is recognised by that, and has no
`ChatTurns`. Rejected: a table of families, which knows each template only as it was when the table was written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

Message = Mapping[str, str]
_SYSTEM, _USER, _ANSWER, _SECOND = "Qsystemq", "Quserq", "Qanswerq", "Qsecondq"
# Longer than what the text is found with; names and a line break would show a template that looks at content.
_LONG = [
    {"role": role, "content": text}
    for role, text in (
        ("user", "What is 2 + 2?"),
        ("assistant", "It is 4.\nShall I explain?"),
        ("user", "Yes"),
        ("assistant", "2 + 2 = 1 + 1 + 1 + 1."),
        ("user", "Thanks <b>!"),
    )
]
_BRIEFING = {"role": "system", "content": "Answer briefly.\nBe kind."}


@dataclass(frozen=True)
class ChatTurns:
    """Fixed text between messages. Users and assistants take turns; the prompt ends after a user's message."""

    start: str
    """Before the first user message, where there is no system message; a default one is a part of it."""
    before_system: str | None
    """None: the template takes no system message."""
    after_system: str
    """Between the system message and the first user message."""
    to_answer: str
    """Between a user's message and an earlier answer."""
    to_user: str
    """Between an answer and the next user message."""
    prompt: str
    """Between the last user message and what the model is to say."""

    def render(self, messages: Sequence[Message]) -> str:
        """A prompt that ends with a user's message."""
        text, rest = self.start, list(messages)
        if rest[0]["role"] == "system":
            text = (self.before_system or "") + rest.pop(0)["content"] + self.after_system
        for index, message in enumerate(rest):
            is_last = index + 1 == len(rest)
            between = self.to_user if message["role"] == "assistant" else self.prompt if is_last else self.to_answer
            text += message["content"] + between
        return text


def find_chat_turns(template: str, special_tokens: Mapping[str, str]) -> ChatTurns | None:
    """The text that `template` (Jinja) puts between messages, or None where it does more than that.

    `special_tokens` are what the template may name, such as {"eos_token": "</s>"}.
    """
    user, answer, second = (
        {"role": role, "content": text} for role, text in (("user", _USER), ("assistant", _ANSWER), ("user", _SECOND))
    )
    one, two = (_render(template, special_tokens, messages) for messages in ([user], [user, answer, second]))
    first, longer = _split(one, _USER), _split(two, _USER, _ANSWER, _SECOND)
    if first is None or longer is None:
        return None
    start, prompt = first
    _, to_answer, to_user, _ = longer
    system = _split(_render(template, special_tokens, [{"role": "system", "content": _SYSTEM}, user]), _SYSTEM, _USER)
    before, after = (system[0], system[1]) if system else (None, "")
    turns = ChatTurns(start, before, after, to_answer, to_user, prompt)
    checked = [_LONG] if system is None else [_LONG, [_BRIEFING, *_LONG], [_BRIEFING, *_LONG[:1]]]
    agrees = all(turns.render(messages) == _render(template, special_tokens, messages) for messages in checked)
    return turns if agrees else None


def _render(template: str, special_tokens: Mapping[str, str], messages: Sequence[Message]) -> str | None:
    """What transformers makes of the template, in its sandbox; None for what the template refuses."""
    conversation: list[Any] = [dict(message) for message in messages]
    named: dict[str, Any] = dict(special_tokens)
    try:
        rendered = render_jinja_template([conversation], chat_template=template, add_generation_prompt=True, **named)
    except (TemplateError, TypeError, KeyError, ValueError):  # a template may do anything with what it gets
        return None
    return str(rendered[0][0])


def _split(text: str | None, *marks: str) -> list[str] | None:
    """What stands around the marks, each of which must occur once and in order."""
    parts = []
    for mark in marks:
        if text is None or text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text or ""]
