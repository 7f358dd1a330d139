"""The text that a chat template writes between messages, found by rendering the template.

Ollama has a template language of its own, and a Jinja template cannot be translated in general. But the templates of
nearly all families (ChatML and Qwen, Llama 3, Mistral, Gemma, Phi, Zephyr, ...) only put fixed text between messages.
That text is found by rendering conversations of known content, and is then compared with the template on longer
conversations. A template that does more (it rewrites answers, it moves the system message) fails the comparison and has
no `ChatTurns`. Rejected: a table of families, which knows each template only as it was when the table was written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

Message = Mapping[str, str]
_SYSTEM, _USER, _ANSWER, _SECOND = "Qsystemq", "Quserq", "Qanswerq", "Qsecondq"
# Longer than the conversations that the text is found with. Line breaks and marks in the content would show a template
# that looks at it.
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
    """Fixed text between messages. User and assistant take turns, and a prompt ends after a user's message."""

    start: str
    """Before the first user message if there is no system message; contains the template's default one, if any."""
    before_system: str | None
    """Before the system message; None if the template takes none."""
    after_system: str
    """Between the system message and the first user message."""
    to_answer: str
    """Between a user's message and an earlier answer."""
    to_user: str
    """Between an answer and the next user message."""
    prompt: str
    """Between the last user message and the model's answer."""

    def render(self, messages: Sequence[Message]) -> str:
        """Render a prompt; the last of `messages` is a user's."""
        text, rest = self.start, list(messages)
        if rest[0]["role"] == "system":
            text = (self.before_system or "") + rest.pop(0)["content"] + self.after_system

        for index, message in enumerate(rest):
            is_last = index + 1 == len(rest)
            between = self.to_user if message["role"] == "assistant" else self.prompt if is_last else self.to_answer
            text += message["content"] + between
        return text


def find_chat_turns(template: str, special_tokens: Mapping[str, str]) -> ChatTurns | None:
    """Find the text that `template` (Jinja) puts between messages; None if it does more than that.

    `special_tokens` are those that the template may name, such as {"eos_token": "</s>"}.
    """
    user, answer, second = (
        {"role": role, "content": text} for role, text in (("user", _USER), ("assistant", _ANSWER), ("user", _SECOND))
    )

    # One turn gives the beginning and the prompt's end; a second turn gives the text around an answer.
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
    # The template must not do more than the turns say, on longer conversations and with a system message.
    agrees = all(turns.render(messages) == _render(template, special_tokens, messages) for messages in checked)
    return turns if agrees else None


def answer_end(template: str, special_tokens: Mapping[str, str]) -> str | None:
    """The text that `template` puts behind the last answer of a conversation; None if the answer cannot be found."""
    messages = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    parts = _split(_render(template, special_tokens, messages, asks=False), _ANSWER)
    return parts[1] if parts else None


def _render(
    template: str, special_tokens: Mapping[str, str], messages: Sequence[Message], *, asks: bool = True
) -> str | None:
    """Render with transformers, in its sandbox; None if the template refuses the messages.

    `asks`: the text ends where the model is to answer.
    """
    conversation: list[Any] = [dict(message) for message in messages]
    named: dict[str, Any] = dict(special_tokens)
    try:
        rendered = render_jinja_template([conversation], chat_template=template, add_generation_prompt=asks, **named)
    except (TemplateError, TypeError, KeyError, ValueError):  # a template may do anything with its input
        return None
    return str(rendered[0][0])


def _split(text: str | None, *marks: str) -> list[str] | None:
    """The text around the marks; None unless each mark occurs once, in this order."""
    parts = []
    for mark in marks:
        if text is None or text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text or ""]
