"""The sizes of a pass that a recording cannot change. Pure.

Packs of documents differ in tokens, documents and the longest of them from pass to pass, so that none would come again.
A recording takes all packs that are a little smaller: rows behind the last token are one more document, of zeros. How
many documents there are, and how long they are, matters to attention alone, whose blocks beyond the end of a document
end at once: so these bounds are generous, and nearly all packs of a run share one recording.
"""

from typing import NamedTuple

from triton import next_power_of_2

from finetune_kernels.primitives.attention.inputs import PackedSequences

PARTS = 8
"""Sizes of a recording between a power of two and the next: fewer than an eighth of its rows are empty."""
MEAN = 128
"""Tokens of a document, on average, down to which packs share a recording."""
LONGEST = 4096
"""Tokens of a document up to which they share it."""


class PassShape(NamedTuple):
    """Sizes of a pass, or of all those that one recording takes."""

    rows: int
    """Tokens of the pass, T."""
    sequences: int
    longest: int
    """Tokens of the longest sequence, or a bound of it."""
    trains_input: bool
    """True if the first layer's input needs a gradient."""
    is_bound: bool = False
    """True if passes may be smaller."""

    @classmethod
    def of(cls, sequences: PackedSequences, *, trains_input: bool, pads: bool) -> "PassShape":
        """Returns the shape of a pass; `pads`: layers may get rows behind the last token."""
        if not pads or sequences.is_batch:
            return cls(sequences.tokens, sequences.count, sequences.max_seqlen, trains_input)

        step = max(1, next_power_of_2(sequences.tokens + 1) // 2 // PARTS)
        rows = -(-sequences.tokens // step) * step
        return cls(
            rows=rows,
            sequences=next_power_of_2(max(sequences.count + 1, rows // MEAN)),
            longest=next_power_of_2(max(sequences.max_seqlen, min(rows, LONGEST))),
            trains_input=trains_input,
            is_bound=True,
        )
