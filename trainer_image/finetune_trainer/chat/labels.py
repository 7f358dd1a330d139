"""Labels of an encoded example, from the answers that `encoder.py` found: their tokens carry loss. Pure."""

from bisect import bisect_right
from dataclasses import dataclass, replace

from finetune_trainer.chat.sandbox.reasoning import Fate

IGNORED = -100  # label of a token without loss, as in torch's cross entropy

CharacterRange = tuple[int, int]
"""Characters [start, end) of a text."""


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels (the id, or -100 for no loss) of one example, of equal length."""

    input_ids: list[int]
    labels: list[int]

    reasoning: tuple[Fate, ...] = ()
    """What the chat template made of the reasoning of answers that carry loss, each in its turn."""

    def truncated(self, length: int) -> "Encoded":
        """The first `length` tokens."""
        return replace(self, input_ids=self.input_ids[:length], labels=self.labels[:length])

    @property
    def supervised(self) -> int:
        """Number of tokens with loss; the first token of a sequence never has any, as nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


def label_tokens(ids: list[int], has_loss: list[bool]) -> Encoded:
    """The example whose labels are its ids where `has_loss`, -100 elsewhere."""
    return Encoded(ids, [token if on else IGNORED for token, on in zip(ids, has_loss, strict=True)])


def overlaps(ranges: list[CharacterRange], spans: list[CharacterRange]) -> list[bool]:
    """Marks each token, given by its characters [start, end), that shares a character with one of the spans.

    `spans` are sorted and do not overlap. An answer's first token may begin in the white space before the answer; it
    counts as the answer's.
    """
    starts = [start for start, _ in spans]
    flags = []

    for start, end in ranges:
        at = bisect_right(starts, end - 1) - 1
        # Some tokenizers give a token of white space the empty range behind it.
        flags.append(at >= 0 and min(start, end - 1) < spans[at][1])

    return flags
