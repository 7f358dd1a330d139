"""Counts what messages say besides role and text, where it has no meaning, and calls that no tool declares. Pure."""

from dataclasses import dataclass, field

from finetune_api.vocabulary import TrainOn
from finetune_trainer.data.layouts import Conversation
from finetune_trainer.data.messages import FLAGS, KNOWN_KEYS
from finetune_trainer.data.tools import find_undeclared
from finetune_trainer.preflight.tallies.rows import RowTally

MAX_NAMES = 100
"""Names that are counted; a data set with more of them has the first of them named all the same."""


@dataclass
class MessageTally:
    """Counts over all rows."""

    keys: dict[str, RowTally] = field(default_factory=dict)
    """Rows by the key of a message that has no meaning here, or a flag on a message that is no answer."""

    undeclared: dict[str, RowTally] = field(default_factory=dict)
    """Rows by what they call without declaring it: a tool, or tool.argument."""

    def add(self, location: str, example: Conversation, train_on: TrainOn) -> None:
        """Takes a row."""
        names = {name for message in example.messages if len(message) > 2 for name in message if name not in KNOWN_KEYS}
        for name in sorted(names):
            if name not in FLAGS or _has_deaf_flag(example, name, train_on):
                _count(self.keys, name, location)

        if example.tools:
            for name in sorted(set(find_undeclared(example.messages, example.tools))):
                _count(self.undeclared, name, location)


def _has_deaf_flag(example: Conversation, name: str, train_on: TrainOn) -> bool:
    """True if a message that is no answer says otherwise than `train_on` does whether it is learned."""
    return any(name in message and bool(message[name]) != (train_on is TrainOn.ALL) for message in example.messages)


def _count(tallies: dict[str, RowTally], name: str, location: str) -> None:
    if name in tallies or len(tallies) < MAX_NAMES:
        tallies.setdefault(name, RowTally()).add(location)
