"""Packed documents as padded batches, for modules that carry a state from token to token.

A module that knows nothing of packed documents runs once for each batch, [documents, tokens, width], padded on the
right, where padding changes nothing before it. A batch has documents of more than half its longest, so that less than
half of it is padding, and a pack of documents between 64 and 2,048 tokens needs five batches at most.

Kernels that take the documents' ends need no batches (`linear_attention.py`). They cannot be counted on: each mixer
needs two of them (convolution and scan), from packages that an image may lack, and where one lacks, transformers' own
module refuses packed documents or lets them see each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from finetune_kernels.primitives.attention.inputs import PackedSequences

Module = Callable[[torch.Tensor], torch.Tensor]
"""[documents, tokens, width] -> the same shape."""


@dataclass(frozen=True)
class DocumentBatches:
    """Places of packed rows in batches that are laid end to end."""

    shapes: tuple[tuple[int, int], ...]
    """Documents and tokens of each batch."""
    slots: torch.Tensor | None
    """The place of each packed row [T], int64; None if the rows are one batch as they are."""

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> "DocumentBatches":
        """Returns the batches of packed documents of these lengths."""
        if len(set(lengths)) == 1:
            return cls(((len(lengths), lengths[0]),), None)

        batches: list[list[int]] = []  # numbers of documents, the longest first
        for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
            if not batches or 2 * lengths[number] <= lengths[batches[-1][0]]:
                batches.append([])
            batches[-1].append(number)

        shapes, places, first = [], [torch.empty(0, dtype=torch.int64)] * len(lengths), 0
        for batch in batches:
            longest = lengths[batch[0]]
            shapes.append((len(batch), longest))
            for number in batch:
                places[number] = torch.arange(first, first + lengths[number])
                first += longest
        return cls(tuple(shapes), torch.cat(places).to(device))

    @property
    def padding(self) -> int:
        """Rows of padding in all batches."""
        rows = sum(count * length for count, length in self.shapes)
        return 0 if self.slots is None else rows - self.slots.numel()

    def run(self, module: Module, rows: torch.Tensor) -> torch.Tensor:
        """Returns the module's outputs for packed `rows`, both [T, width]."""
        if self.slots is None:
            return module(rows.view(*self.shapes[0], -1)).flatten(0, 1)

        sizes = [count * length for count, length in self.shapes]
        padded = rows.new_zeros(sum(sizes), rows.shape[1]).index_copy(0, self.slots, rows)
        parts = [part.view(*shape, -1) for part, shape in zip(torch.split(padded, sizes), self.shapes, strict=True)]
        return torch.cat([module(part).flatten(0, 1) for part in parts]).index_select(0, self.slots)


class BatchesOfPass:
    """The batches of the pass that runs: all mixers of a model share them, as finding them waits for the device."""

    def __init__(self) -> None:
        self._ends: torch.Tensor | None = None
        self._found = DocumentBatches((), None)

    def of(self, sequences: PackedSequences) -> DocumentBatches:
        """Returns the batches of packed sequences. The same tensor of ends is that of the same pass."""
        if sequences.is_batch:
            return DocumentBatches(((sequences.count, sequences.max_seqlen),), None)
        if self._ends is not sequences.cu_seqlens:
            ends = sequences.cu_seqlens.tolist()
            lengths = [last - first for first, last in pairwise(ends) if last > first]
            self._found = DocumentBatches.of_lengths(lengths, sequences.cu_seqlens.device)
            self._ends = sequences.cu_seqlens
        return self._found
