"""Counts passes by their shape: cuDNN compiles a plan for each, which pays only where the shape comes again.

The decision is made once, where a pass begins, and stays with its sequences. Forward, recomputation and backward must
take the same kernel, as one kernel's softmax sums mean nothing to another's backward.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from finetune_kernels.primitives.attention.inputs import PackedSequences

PASSES = 3
"""The pass of a shape from which on it comes again. Of documents in passes of their own, many lengths meet another by
chance or in a second epoch: at the second pass a plan would be compiled for each. From the fourth on a pass may be
recorded as a graph, and nothing must be compiled then. The first two may be one batch in two precisions, compared."""


class PassCounts:
    """The passes of one model so far: some 130 bytes for each shape that has come."""

    def __init__(self) -> None:
        self._passes: Counter[tuple[int, int]] = Counter()

    def begin(self, sequences: PackedSequences) -> PackedSequences:
        """Counts a pass; returns its sequences, which know if their shape comes again. Sequences of mixed lengths are
        not counted, as no kernel is compiled for them, nor are passes without gradients: a trainer compares those that
        it makes before training, so all of them take the same kernel."""
        if not sequences.is_batch:
            return sequences
        shape = sequences.count, sequences.max_seqlen
        self._passes[shape] += torch.is_grad_enabled()
        return replace(sequences, comes_again=self._passes[shape] >= PASSES)


class PassesByEnds:
    """The same for layers that do not know of each other: the same tensor of ends is that of the same pass."""

    def __init__(self) -> None:
        self._counts = PassCounts()
        self._begun = WeakTensorKeyDictionary()
        """By the ends of each pass whose tensors live: whether its shape comes again."""

    def of(self, ends: torch.Tensor, sequences: PackedSequences) -> PackedSequences:
        """Returns the sequences of a layer's call, `ends` as the whole pass has them; counts a pass at its first."""
        if ends not in self._begun:
            self._begun[ends] = self._counts.begin(sequences).comes_again
        return replace(sequences, comes_again=self._begun[ends])
