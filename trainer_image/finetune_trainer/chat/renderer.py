"""Renders conversations through the chat template, in the sandbox, with the row's control tokens kept as text."""

from typing import Any

from finetune_api.failures import FailureReason
from finetune_trainer.chat.call_arguments import (
    prefers_text,
    probe_object,
    probe_text,
    with_arguments,
    write_arguments,
)
from finetune_trainer.chat.control_tokens import ControlTokens, RenderedChat
from finetune_trainer.chat.sandbox.process import LimitError, RenderingProcess, TemplateSetup
from finetune_trainer.chat.sandbox.reasoning import Fate, has_reasoning
from finetune_trainer.data.layouts import Conversation
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.errors import TrainerError

MAX_LIMIT_ERRORS = 3
"""Rows in a row over the sandbox's limits after which the template is to blame, not the rows."""

OPTIONS = {"spans": False, "reasoning": False, "asked": False}
"""A request's options: whether to find answers, what became of reasoning, and whether an answer is asked for."""

UNKNOWN_SPANS = (
    "the chat template does not show which part of the text is an answer: mark answers with {% generation %} in "
    "spec.model.chatTemplate, or set spec.dataset.trainOn: All"
)


class RefusedRowError(BadRowError):
    """A row that the chat template cannot take; the message is the template's own."""


class ChatRenderer:
    """The chat template of one tokenizer.

    Its methods raise RefusedRowError for a row that the template refuses, TrainerError (InvalidChatTemplate) for a
    template that fails whatever the row.
    """

    def __init__(self, tokenizer: Any, controls: ControlTokens, process: RenderingProcess) -> None:
        self._tokenizer = tokenizer
        self._controls = controls
        self._process = process
        self._limit_errors = 0
        self._takes_text: dict[str, bool] = {}
        """For each template that was tried: True if it takes the arguments of calls as JSON text, not as objects."""

        special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self._special_tokens = tuple(sorted(special - {""}))

    def render(self, example: Conversation, *, needs_spans: bool) -> RenderedChat:
        """The conversation's text, where its answers are if `needs_spans`, and what became of their reasoning."""
        messages, tools = example.messages, example.tools
        if any("tool_calls" in message for message in messages) and self._wants_text(messages, tools):
            messages = with_arguments(messages, write_arguments)
        asks_reasoning = not needs_spans and any(map(has_reasoning, messages))  # with spans it comes along
        return self._render(messages, tools, spans=needs_spans, reasoning=asks_reasoning)

    def render_question(self, question: str) -> RenderedChat:
        """A user's question, followed by the header with which the template asks for an answer."""
        return self._render([{"role": "user", "content": question}], None, asked=True)

    def render_probe(self) -> str:
        """The text of the smallest conversation; shows that the template works at all."""
        return self._render([{"role": "user", "content": "x"}], None).text

    def _wants_text(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> bool:
        """True if the template takes the arguments of calls as text (DeepSeek's joins them to a text).

        Decided once for each template, by the first row with calls that it can print.
        """
        template = self._choose_template(tools)
        if template not in self._takes_text:
            printed = [self._try(with_arguments(messages, probe), tools) for probe in (probe_object, probe_text)]
            if (decided := prefers_text(*printed)) is None:
                return False
            self._takes_text[template] = decided
        return self._takes_text[template]

    def _try(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str | None:
        """The text of a conversation; None if the template refuses it."""
        try:
            return self._render(messages, tools).text
        except BadRowError:
            return None

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: bool) -> RenderedChat:
        """The text of a conversation; `options` are those of the sandbox's request."""
        has_tokens = self._controls.find(messages) is not None or self._controls.find(tools) is not None
        if has_tokens:
            messages, tools = self._controls.hide(messages), self._controls.hide(tools)

        answer = self._ask({"messages": messages, "tools": tools, **OPTIONS, **options})
        text, spans = answer["text"], [(start, end, message) for start, end, message in answer["spans"]]
        chat = self._controls.restore(text, spans) if has_tokens else RenderedChat(text, spans, [])
        return chat._replace(reasoning=tuple((message, Fate(fate)) for message, fate in answer["reasoning"]))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The sandbox's answer to a request."""
        setup = TemplateSetup(
            self._choose_template(request["tools"]), self._tokenizer.special_tokens_map, self._special_tokens
        )
        try:
            answer = self._process.ask(setup, request)
        except LimitError as error:
            # A single row may be too large; a template that is greedy with every row would take 20 s for each.
            self._limit_errors += 1
            if self._limit_errors >= MAX_LIMIT_ERRORS:
                raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, f"the chat template: {error}") from None
            raise RefusedRowError(f"the chat template refuses the row: {error}") from None

        self._limit_errors = 0
        _raise_error(answer)
        return answer

    def _choose_template(self, tools: list[Any] | None) -> str:
        """The tokenizer's template for a row; some tokenizers have another one for rows with tools."""
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:  # several templates, and none of them is the default
            message = f"the tokenizer's chat templates: {(str(error).splitlines() or ['none'])[0][:300]}"
            raise RefusedRowError(message) from None


def _raise_error(answer: dict[str, Any]) -> None:
    """Raises the error that the sandbox answered with, if any."""
    match answer.get("error"):
        case "row":
            raise RefusedRowError(f"the chat template refuses the row: {answer['message']}")
        case "unprinted":
            message = f"the chat template leaves out {answer['message']}, so nothing could be learned from it"
            raise RefusedRowError(f"{message}: take it out of the row, or change spec.model.chatTemplate")
        case "spans":
            raise RefusedRowError(UNKNOWN_SPANS)
        case "template":
            message = f"the chat template is not valid: {answer['message']}"
            raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, message)
