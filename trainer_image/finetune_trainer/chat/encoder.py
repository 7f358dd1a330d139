"""Encodes examples: the chat template is rendered, its text tokenized, and loss put on what the model is to say.

A token carries loss if any of its characters belongs to an answer. So the first token of an answer is learned even if
it merges with the white space at the header's end. Where a template ends answers without a control token (GLM 4), the
tokenizer's end-of-sequence token is added behind the last answer, or the model would never learn to stop.
"""

from dataclasses import replace
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.vocabulary import TrainOn
from finetune_trainer.chat.control_tokens import ControlTokens, RenderedChat
from finetune_trainer.chat.embedding import check_token_ids
from finetune_trainer.chat.labels import IGNORED, CharacterRange, Encoded, label_tokens, overlaps
from finetune_trainer.chat.renderer import ChatRenderer, RefusedRowError
from finetune_trainer.chat.sandbox.process import SHARED, RenderingProcess
from finetune_trainer.chat.templates import advise
from finetune_trainer.data.layouts import Conversation, Example, PlainText
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.errors import TrainerError

UNWEIGHABLE = (
    "the {% generation %} marks of the chat template do not show which answer is which, so weight 0 cannot be applied: "
    "remove the weights, or change spec.model.chatTemplate"
)
MISSING_TEMPLATE = "the rows are conversations, but the tokenizer has no chat template"


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
        """`embedding_rows`: number of token ids that the model has an embedding for; None if unknown."""
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._embedding_rows = embedding_rows
        self._controls = ControlTokens(tokenizer)
        self._renderer = ChatRenderer(tokenizer, self._controls, process)
        self._beginning = _find_beginning(tokenizer)

        self._first_refusal = ""
        self._has_rendered = False

        self.answers_without_end = 0
        """Conversations so far whose last answer the template ends without a control token.

        They got the end-of-sequence token, if the tokenizer has one.
        """

    def find_problem(self) -> str | None:
        """The reason why the template takes no row at all, if it has refused each so far; None before the first."""
        if self._has_rendered or not self._first_refusal:
            return None
        return f"the chat template takes none of the rows; of the first it says: {self._first_refusal}"

    def encode(self, example: Example) -> Encoded:
        """Token ids and labels. Raises BadRowError for a row that the template refuses, TrainerError if the template is
        wrong or the tokenizer is another model's."""
        if isinstance(example, PlainText):
            encoded = self._encode_text(example.text)
        elif not self._tokenizer.chat_template:
            encoded = self._encode_without_template(example)
        else:
            encoded = self._encode_conversation(example)

        check_token_ids(encoded.input_ids, self._embedding_rows, self._tokenizer)
        return encoded

    def encode_question(self, question: str) -> list[int]:
        """Token ids of a user's question and of the header that asks for an answer. Raises like `encode`."""
        if self._tokenizer.chat_template:
            chat = self._renderer.render_question(question)
            ids = self._controls.encode(chat.text, chat.row_tokens)[0]
        else:
            ids = self._tokenize_text(question)

        check_token_ids(ids, self._embedding_rows, self._tokenizer)
        return ids

    def find_control_token(self, example: Example) -> str | None:
        """The first control token that the example contains as text and that is encoded as plain text; None if it
        contains none."""
        if isinstance(example, PlainText) or not self._tokenizer.chat_template:
            return None
        return self._controls.find(example.messages) or self._controls.find(example.tools)

    def render_probe(self) -> str:
        """The text that the template prints for one question. Raises like `encode`."""
        return self._renderer.render_probe()

    def _encode_conversation(self, example: Conversation) -> Encoded:
        learns_all = self._train_on is TrainOn.ALL
        chat = self._render(example, needs_spans=not learns_all or bool(example.context))
        if example.context and any(message < 0 for _, _, message in chat.spans):
            raise BadRowError(UNWEIGHABLE)

        ids, ranges = self._controls.encode(chat.text, chat.row_tokens)  # both [T]

        # Answers with weight 0 are context: read by the model, never learned.
        context = [(start, end) for start, end, message in chat.spans if message in example.context]
        answers = [(start, end) for start, end, message in chat.spans if message not in example.context]
        has_loss = [not off for off in overlaps(ranges, context)] if learns_all else overlaps(ranges, answers)

        if _ends_with_learned_answer(example) and self._lacks_end(ids, ranges, has_loss, len(chat.text.rstrip())):
            self.answers_without_end += 1
            ids, has_loss = self._add_end(ids, has_loss)

        fates = tuple(fate for message, fate in chat.reasoning if message not in example.context)
        return replace(label_tokens(ids, has_loss), reasoning=fates)

    def _render(self, example: Conversation, *, needs_spans: bool) -> RenderedChat:
        """The example's text; whether the template takes rows at all is remembered."""
        try:
            chat = self._renderer.render(example, needs_spans=needs_spans)
        except RefusedRowError as error:
            self._first_refusal = self._first_refusal or str(error)
            raise

        self._has_rendered = True
        return chat

    def _lacks_end(self, ids: list[int], ranges: list[CharacterRange], has_loss: list[bool], length: int) -> bool:
        """True if the last learned token reaches the text's end (`length` characters without trailing white space) and
        is no control token."""
        learned = [index for index in range(len(ids)) if has_loss[index] and ranges[index][0] < length]
        if not learned:
            return False
        last = learned[-1]
        return ranges[last][1] >= length and ids[last] not in self._controls

    def _add_end(self, ids: list[int], has_loss: list[bool]) -> tuple[list[int], list[bool]]:
        """The tokens with the end-of-sequence token, learned, in place of what follows the last answer."""
        end = self._tokenizer.eos_token_id
        if end is None:
            return ids, has_loss
        length = max(index for index, on in enumerate(has_loss) if on) + 1
        return [*ids[:length], end], [*has_loss[:length], True]

    def _encode_text(self, text: str) -> Encoded:
        """A text with loss on all of it, and its end."""
        ids = self._tokenize_text(text)
        if self._tokenizer.eos_token_id is not None and ids[-1:] != [self._tokenizer.eos_token_id]:
            ids = [*ids, self._tokenizer.eos_token_id]
        return Encoded(ids, list(ids))

    def _tokenize_text(self, text: str) -> list[int]:
        """Token ids of a text with what the tokenizer puts in front of it, once if the text has it already."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        length = len(self._beginning)
        return ids[length:] if length and ids[length : 2 * length] == self._beginning else ids

    def _encode_without_template(self, example: Conversation) -> Encoded:
        """A prompt and its completion, one behind the other."""
        is_joined = example.is_continuation and len(example.messages) == 2  # no system message
        if not is_joined:
            raise TrainerError(FailureReason.CHAT_TEMPLATE_MISSING, f"{MISSING_TEMPLATE}: {advise(self._tokenizer)}")

        prompt = self._tokenize_text(example.messages[0]["content"])
        answer = self._encode_text(example.messages[1]["content"]).input_ids

        # The beginning-of-sequence token stands before the prompt only.
        bos = self._tokenizer.bos_token_id
        completion = answer[1:] if bos is not None and answer[:1] == [bos] else answer

        prompt_labels = prompt if self._train_on is TrainOn.ALL else [IGNORED] * len(prompt)
        return Encoded(prompt + completion, prompt_labels + completion)


def _ends_with_learned_answer(example: Conversation) -> bool:
    last = len(example.messages) - 1
    return example.messages[last]["role"] == "assistant" and last not in example.context


def _find_beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts in front of a text; mostly none or one, such as <s>."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[: next(starts, 0)] if plain else []
