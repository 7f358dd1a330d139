"""From an example to tokens and labels: the chat template rendered, and loss on what the model is to say.

The text and the places of its answers come from `rendering`, in a process of its own: templates are programs that
others wrote. A token carries loss where any of its characters belongs to an answer; so the first token of an answer
that merges with the header's last white space is learned, too. Where a template ends answers with no control token
(GLM 4), the last one is followed by the tokenizer's end of sequence, or a model would never learn to stop.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.vocabulary import TrainOn
from finetune_trainer.chat.control_tokens import ControlTokens, Shown
from finetune_trainer.chat.sandbox.process import SHARED, LimitError, RenderingProcess, TemplateSetup
from finetune_trainer.data.layouts import Conversation, Example, PlainText
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.strict_json import excerpt
from finetune_trainer.errors import TrainerError

IGNORED = -100  # label of a token without loss, as in torch's cross entropy
MAX_LIMIT_ERRORS = 3
UNKNOWN_SPANS = (
    "the chat template does not show which part of the text is an answer: mark answers with {% generation %} in "
    "spec.model.chatTemplate, or set trainOn: All"
)
UNWEIGHABLE = "answers with weight 0 cannot be told from others in what the chat template marks with {% generation %}"


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels (the id, or -100 for no loss) of one example, of equal length."""

    input_ids: list[int]
    labels: list[int]

    def truncated(self, length: int) -> "Encoded":
        """The first `length` tokens."""
        return Encoded(self.input_ids[:length], self.labels[:length])

    @property
    def supervised(self) -> int:
        """Tokens that carry loss; the first token of a sequence never does, as nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


class ChatEncoder:
    """Encodes examples for one tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        train_on: TrainOn,
        process: RenderingProcess = SHARED,
        *,
        embedding_rows: int | None = None,
    ) -> None:
        """`embedding_rows`: how many tokens the model knows; None where that is not known."""
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._process = process
        self._embedding_rows = embedding_rows
        self._limit_errors = 0
        special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self._special_tokens = tuple(sorted(special - {""}))
        self._controls = ControlTokens(tokenizer)
        self.open_ends = 0
        """Conversations so far whose last answer the template ends with no control token; they got the end of sequence,
        where the tokenizer has one."""

    def encode(self, example: Example) -> Encoded:
        """Tokens and labels. Raises BadRowError for a row that the template refuses, TrainerError where it is the
        template that is wrong, or the tokenizer not the model's."""
        encoded = self._encode(example)
        self._check_embedding(encoded.input_ids)
        return encoded

    def _check_embedding(self, ids: list[int]) -> None:
        if self._embedding_rows is not None and (token := max(ids, default=0)) >= self._embedding_rows:
            name = self._tokenizer.convert_ids_to_tokens(token)
            raise beyond_embedding({token: str(name)}, self._embedding_rows)

    def _encode(self, example: Example) -> Encoded:
        if isinstance(example, PlainText):
            return self._encode_text(example.text)
        if not self._tokenizer.chat_template:
            return self._encode_without_template(example)
        everything = self._train_on is TrainOn.ALL
        text, spans, row_tokens = self._render(example, needs_spans=not everything or bool(example.context))
        if example.context and any(message < 0 for _, _, message in spans):
            raise BadRowError(UNWEIGHABLE)
        context = [(start, end) for start, end, message in spans if message in example.context]
        answers = [(start, end) for start, end, message in spans if message not in example.context]
        ids, places = self._controls.encode(text, row_tokens)
        flags = [not off for off in touching(places, context)] if everything else touching(places, answers)
        if self._ends_openly(example, ids, places, flags, len(text.rstrip())):
            self.open_ends += 1
            last = max(index for index, on in enumerate(flags) if on) + 1
            if (end := self._tokenizer.eos_token_id) is not None:
                ids, flags = [*ids[:last], end], [*flags[:last], True]
        return Encoded(ids, [token if on else IGNORED for token, on in zip(ids, flags, strict=True)])

    def _ends_openly(
        self, example: Conversation, ids: list[int], places: list[tuple[int, int]], flags: list[bool], length: int
    ) -> bool:
        """Whether the conversation (`length` characters, without white space at its end) ends with an answer that is
        learned and that no control token ends."""
        last = len(example.messages) - 1
        if example.messages[last]["role"] != "assistant" or last in example.context:
            return False
        behind = next((at for at in range(len(ids) - 1, -1, -1) if flags[at] and places[at][0] < length), None)
        return behind is not None and places[behind][1] >= length and ids[behind] not in self._controls

    def encode_question(self, question: str) -> list[int]:
        """Token ids of a user's words and of what asks for an answer. Raises like `encode`."""
        if self._tokenizer.chat_template:
            shown = self._ask_hidden([{"role": "user", "content": question}], None, asked=True)
            ids = self._controls.encode(shown.text, shown.row_tokens)[0]
        else:
            ids = list(self._tokenizer(question)["input_ids"])
        self._check_embedding(ids)
        return ids

    def find_control_token(self, example: Example) -> str | None:
        """A control token that the example spells out and that becomes plain text; None where it has none."""
        if isinstance(example, PlainText) or not self._tokenizer.chat_template:
            return None
        return self._controls.find(example.messages) or self._controls.find(example.tools)

    def print_probe(self) -> str:
        """What the template prints for one question; raises like `encode`."""
        return self._ask_hidden([{"role": "user", "content": "x"}], None).text

    def _render(self, example: Conversation, *, needs_spans: bool) -> Shown:
        return self._ask_hidden(example.messages, example.tools, spans=needs_spans)

    def _ask_hidden(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, spans: bool = False, asked: bool = False
    ) -> Shown:
        """What the template prints, in which the row's control tokens are text."""
        has_tokens = self._controls.find(messages) is not None or self._controls.find(tools) is not None
        if has_tokens:
            messages, tools = self._controls.hide(messages), self._controls.hide(tools)
        answer = self._ask({"messages": messages, "tools": tools, "spans": spans, "asked": asked})
        found = [(start, end, message) for start, end, message in answer["spans"]]
        return self._controls.show(answer["text"], found) if has_tokens else Shown(answer["text"], found, [])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            template = self._tokenizer.get_chat_template(tools=request["tools"])
        except ValueError as error:  # several templates, and none of them the default
            message = f"the tokenizer's chat templates: {(str(error).splitlines() or ['none'])[0][:300]}"
            raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, message) from None
        setup = TemplateSetup(template, self._tokenizer.special_tokens_map, self._special_tokens)
        try:
            answer = self._process.ask(setup, request)
        except LimitError as error:
            self._limit_errors += 1
            if self._limit_errors >= MAX_LIMIT_ERRORS:
                raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, f"the chat template: {error}") from None
            raise BadRowError(f"the chat template refuses the row: {error}") from None
        match answer.get("error"):
            case "row":
                raise BadRowError(f"the chat template refuses the row: {answer['message']}")
            case "unprinted":
                raise BadRowError(f"the chat template leaves out {answer['message']}: nothing could be learned from it")
            case "spans":
                raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, UNKNOWN_SPANS)
            case "template":
                message = f"the chat template is not valid: {answer['message']}"
                raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, message)
        return answer

    def _encode_text(self, text: str) -> Encoded:
        ids = self._tokenizer(text)["input_ids"]
        if self._tokenizer.eos_token_id is not None and ids[-1:] != [self._tokenizer.eos_token_id]:
            ids = [*ids, self._tokenizer.eos_token_id]
        return Encoded(ids, list(ids))

    def _encode_without_template(self, example: Conversation) -> Encoded:
        if [message["role"] for message in example.messages] != ["user", "assistant"]:
            message = "the tokenizer has no chat template, and the rows are conversations"
            raise TrainerError(FailureReason.CHAT_TEMPLATE_MISSING, message)
        prompt = self._tokenizer(example.messages[0]["content"])["input_ids"]
        whole = self._encode_text(example.messages[1]["content"]).input_ids
        bos = self._tokenizer.bos_token_id
        completion = whole[1:] if bos is not None and whole[:1] == [bos] else whole
        hidden = prompt if self._train_on is TrainOn.ALL else [IGNORED] * len(prompt)
        return Encoded(prompt + completion, hidden + completion)


def beyond_embedding(tokens: dict[int, str], rows: int) -> TrainerError:
    """What is said of token ids that the model has no embedding for."""
    number, name = min(tokens.items())
    more = f" and {len(tokens) - 1} more" if len(tokens) > 1 else ""
    message = (
        f"spec.model.source: the tokenizer's token {excerpt(name)} has id {number}{more}, but the model's embedding "
        f"has {rows} rows: they do not belong together; take the tokenizer of this model, or save the model with "
        "resize_token_embeddings first"
    )
    return TrainerError(FailureReason.INVALID_CONFIGURATION, message)


def touching(places: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Which tokens, given by the characters [start, end) that they stand for, have a character in one of the spans
    (sorted, apart from each other)."""
    starts = [start for start, _ in spans]
    flags = []
    for start, end in places:
        at = bisect_right(starts, end - 1) - 1
        # Some tokenizers give white space the empty place behind it.
        flags.append(at >= 0 and min(start, end - 1) < spans[at][1])
    return flags
