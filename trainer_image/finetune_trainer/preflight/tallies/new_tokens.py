"""Finds which of the job's new tokens the rows use. Pure."""

from collections.abc import Collection, Mapping
from typing import Any

from finetune_trainer.data.layouts import Conversation, Example


class NewTokenTally:
    """The new tokens that nothing has used so far."""

    def __init__(self, ids: Mapping[str, int], template: str = "") -> None:
        """`ids`: the tokens' ids by their text. `template`: the chat template, which may write them itself."""
        self._ids = dict(ids)
        self.unseen = {text: None for text in ids if text not in template}

    def add(self, example: Example) -> None:
        """Takes a row's texts."""
        if self.unseen:
            text = _texts(example)
            self._remove([token for token in self.unseen if token in text])

    def add_encoded(self, ids: Collection[int]) -> None:
        """Takes the tokens of an encoded row: a template may put a token together."""
        if self.unseen:
            found = set(ids)
            self._remove([token for token in self.unseen if self._ids[token] in found])

    def _remove(self, tokens: list[str]) -> None:
        for token in tokens:
            del self.unseen[token]


def _texts(example: Example) -> str:
    if not isinstance(example, Conversation):
        return example.text
    return "\n".join(_text(value) for message in example.messages for value in message.values()) + _text(example.tools)


def _text(value: Any) -> str:
    """All texts in a value."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\n".join(map(_text, [*value, *value.values()]))
    return "\n".join(map(_text, value)) if isinstance(value, list | tuple) else ""
