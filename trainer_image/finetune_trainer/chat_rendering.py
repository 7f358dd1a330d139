"""From an example to tokens and labels: the chat template rendered, and loss on what the model is to say.

Assistant turns are found by the template's own `{% generation %}` marks where it has them. Otherwise each turn is
rendered with and without its answer: what the answer adds is the answer, end-of-turn mark included. A template that
rewrites earlier turns (as some reasoning models' do) cannot be split so; TRL knows training templates for those,
which are used if they render alike.
"""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from trl.chat_template_utils import get_training_chat_template

from finetune_api.failures import FailureReason
from finetune_api.vocabulary import TrainOn
from finetune_trainer.chat_messages import BadRowError
from finetune_trainer.dataset_formats import Conversation, Example, PlainText
from finetune_trainer.errors import TrainerError

IGNORED = -100  # label of a token without loss, as in torch's cross entropy
GENERATION_MARK = "generation %}"
# What rendering a template that others wrote can raise; escapes from the sandbox are TemplateErrors.
RENDERING_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


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

    def __init__(self, tokenizer: Any, train_on: TrainOn) -> None:
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._marked = self._marked_template()

    def encode(self, example: Example) -> Encoded:
        """Tokens and labels; raises BadRowError for a row that the template refuses."""
        if isinstance(example, PlainText):
            return self._encode_text(example.text)
        if not self._tokenizer.chat_template:
            return self._encode_without_template(example)
        try:
            if self._train_on is TrainOn.ALL:
                ids = self._tokenize(self._render(example, example.messages))["input_ids"]
                return Encoded(ids, list(ids))
            return self._encode_marked(example) if self._marked else self._encode_by_prefixes(example)
        except RENDERING_ERRORS as error:
            why = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise BadRowError(f"the chat template refuses the row: {why}") from None

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

    def _encode_marked(self, example: Conversation) -> Encoded:
        encoded = self._tokenizer.apply_chat_template(
            example.messages,
            tools=example.tools,
            chat_template=self._marked,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
        return Encoded(ids, [token if on else IGNORED for token, on in zip(ids, mask, strict=True)])

    def _encode_by_prefixes(self, example: Conversation) -> Encoded:
        text = self._render(example, example.messages)
        spans = []
        for index, message in enumerate(example.messages):
            if message["role"] == "assistant":
                before = self._render(example, example.messages[:index], add_generation_prompt=True)
                through = self._render(example, example.messages[: index + 1])
                if not (text.startswith(through) and through.startswith(before)):
                    problem = (
                        "the chat template changes earlier turns when later ones are added, so answers cannot be told "
                        "apart: mark them with {% generation %} in spec.model.chatTemplate, or set trainOn: All"
                    )
                    raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, problem)
                spans.append((len(before), len(through)))
        encoded = self._tokenize(text, return_offsets_mapping=True)
        ids, labels = encoded["input_ids"], []
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
            inside = any(start >= first and end <= last and end > start for first, last in spans)
            labels.append(token if inside else IGNORED)
        return Encoded(ids, labels)

    def _render(self, example: Conversation, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tools=example.tools, tokenize=False, **options))

    def _tokenize(self, text: str, **options: Any) -> Any:
        # The template writes its own special tokens.
        return self._tokenizer(text, add_special_tokens=False, **options)

    def _marked_template(self) -> str | None:
        template = self._tokenizer.chat_template
        if not template or self._train_on is TrainOn.ALL or not isinstance(template, str):
            return None
        if GENERATION_MARK in template:
            return template
        try:
            known = get_training_chat_template(processing_class=self._tokenizer)
        except ValueError:
            return None  # a template that TRL does not know
        return known if known and self._renders_alike(known) else None

    def _renders_alike(self, template: str) -> bool:
        sample = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
        own = self._tokenizer.apply_chat_template(sample, tokenize=False)
        return bool(own == self._tokenizer.apply_chat_template(sample, chat_template=template, tokenize=False))
