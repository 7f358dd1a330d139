"""Tensors that differ between two GGUF files of one model."""

from operator import itemgetter

import gguf
import numpy as np

Pair = tuple[gguf.GGUFReader, gguf.GGUFReader]


def different_tensors(pair: Pair) -> list[str]:
    """Names of tensors that are not the same in both files; order counts, but for experts, which each side collects
    in its own way."""
    ours, theirs = ([(t.name, t.tensor_type, _shape(t), t.data.ravel()) for t in reader.tensors] for reader in pair)
    if any("_exps." in name for name, *_ in ours):
        ours, theirs = sorted(ours, key=itemgetter(0)), sorted(theirs, key=itemgetter(0))
    assert [each[0] for each in ours] == [each[0] for each in theirs]
    return [
        name
        for (name, *form, data), (_, *their_form, their_data) in zip(ours, theirs, strict=True)
        if form != their_form or not np.array_equal(data, their_data)
    ]


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """The shape that llama.cpp sees, which has four dimensions whatever the file says."""
    return (*map(int, tensor.shape), 1, 1, 1)[:4]
