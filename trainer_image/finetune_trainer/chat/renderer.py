"""Renders conversations through the chat template, in the sandbox, with the row's control tokens kept as text."""

from typing import Any

from finetune_api.failures import FailureReason
from finetune_trainer.chat.control_tokens import ControlTokens, RenderedChat
from finetune_trainer.chat.sandbox.process import LimitError, RenderingProcess, TemplateSetup
from finetune_trainer.data.layouts import Conversation
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.errors import TrainerError

MAX_LIMIT_ERRORS = 3
"""Rows over the sandbox's limits after which the template is to blame, not the rows."""

UNKNOWN_SPANS = (
    "the chat template does not show which part of the text is an answer: mark answers with {% generation %} in "
    "spec.model.chatTemplate, or set spec.dataset.trainOn: All"
)


class ChatRenderer:
    """The chat template of one tokenizer.

    Its methods raise BadRowError for a row that the template refuses, TrainerError (InvalidChatTemplate) for a template
    that fails whatever the row.
    """

    def __init__(self, tokenizer: Any, controls: ControlTokens, process: RenderingProcess) -> None:
        self._tokenizer = tokenizer
        self._controls = controls
        self._process = process
        self._limit_errors = 0

        special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self._special_tokens = tuple(sorted(special - {""}))

    def render(self, example: Conversation, *, needs_spans: bool) -> RenderedChat:
        """The conversation's text, and where its answers are if `needs_spans`."""
        return self._render(example.messages, example.tools, spans=needs_spans)

    def render_question(self, question: str) -> RenderedChat:
        """A user's question, followed by the header with which the template asks for an answer."""
        return self._render([{"role": "user", "content": question}], None, asked=True)

    def render_probe(self) -> str:
        """The text of the smallest conversation; shows that the template works at all."""
        return self._render([{"role": "user", "content": "x"}], None).text

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, spans: bool = False, asked: bool = False
    ) -> RenderedChat:
        has_tokens = self._controls.find(messages) is not None or self._controls.find(tools) is not None
        if has_tokens:
            messages, tools = self._controls.hide(messages), self._controls.hide(tools)

        answer = self._ask({"messages": messages, "tools": tools, "spans": spans, "asked": asked})
        found = [(start, end, message) for start, end, message in answer["spans"]]

        return self._controls.restore(answer["text"], found) if has_tokens else RenderedChat(answer["text"], found, [])

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
            raise BadRowError(f"the chat template refuses the row: {error}") from None

        _raise_error(answer)
        return answer

    def _choose_template(self, tools: list[Any] | None) -> str:
        """The tokenizer's template for a row; some tokenizers have another one for rows with tools."""
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:  # several templates, and none of them is the default
            message = f"the tokenizer's chat templates: {(str(error).splitlines() or ['none'])[0][:300]}"
            raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, message) from None


def _raise_error(answer: dict[str, Any]) -> None:
    """Raises the error that the sandbox answered with, if any."""
    match answer.get("error"):
        case "row":
            raise BadRowError(f"the chat template refuses the row: {answer['message']}")
        case "unprinted":
            message = f"the chat template leaves out {answer['message']}, so nothing could be learned from it"
            raise BadRowError(message)
        case "spans":
            raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, UNKNOWN_SPANS)
        case "template":
            message = f"the chat template is not valid: {answer['message']}"
            raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, message)
