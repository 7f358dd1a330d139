"""Length grouping as a sampler for PyTorch's loader."""

from collections.abc import Iterator
from typing import Any

import pyarrow.compute as arrow  # type: ignore[import-untyped]
from datasets import Dataset
from torch.utils.data import Sampler

from finetune_trainer.data.length_grouping import group_by_length


class LengthGroupedSampler(Sampler[int]):
    """Another order in each epoch, which a resumed run repeats: it depends on nothing but seed and epoch."""

    def __init__(self, lengths: list[int], sequences: int, seed: int) -> None:
        self._lengths, self._sequences, self._seed = lengths, sequences, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(group_by_length(self._lengths, self._sequences, self._seed + self._epoch))


def row_lengths(rows: Dataset) -> list[int]:
    """Tokens of each row."""
    table: Any = rows.with_format("arrow")[:]
    return [int(length) for length in arrow.list_value_length(table["input_ids"]).to_pylist()]
