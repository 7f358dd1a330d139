"""Answers of one model, token by token, as text that can be shown at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.training.samples import choose_by, generate_tokens

Message = dict[str, str]
UNFINISHED = "\ufffd"
"""Stands at the end of a decoded text while a character lacks bytes."""


@dataclass(frozen=True)
class Sampling:
    """Length and randomness of answers."""

    max_tokens: int
    temperature: float
    """0 takes the most probable token."""


@dataclass(frozen=True)
class Speaker:
    """A model that answers."""

    name: str
    model: Any
    """transformers' or peft's model, in evaluation mode."""
    tokenizer: Any
    ends: Sequence[int]
    """Tokens that end an answer."""
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered around every answer: the base inside an adapted model has its adapter switched off here."""

    @torch.no_grad()
    def answer(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """Yields pieces of the answer to a conversation. Raises TrainerError if the template refuses it."""
        ids = torch.tensor([self._encode(messages)], device=self._device())
        shown, tokens = "", []

        with self.scope():
            mask = torch.ones_like(ids)
            choose = choose_by(sampling.temperature, [None] * len(ids))
            found = generate_tokens(self.model, ids, mask, self.ends, sampling.max_tokens, choose)
            for token in found:
                if int(token) in self.ends:
                    break
                tokens.append(int(token))
                # The whole answer is decoded anew: a token alone does not know its white space or its missing bytes.
                text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
                if not text.endswith(UNFINISHED) and len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation and of the header that asks for an answer; without a template, of its end."""
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(messages[-1]["content"])["input_ids"])
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            message = f"the chat template refuses this conversation: {error}"
            raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, message) from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device
