"""One process's rows of every step, as a sampler for PyTorch's loader, and the row that stands in for none."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Sampler

from finetune_trainer.chat.labels import IGNORED
from finetune_trainer.distributed.shares import FILLER, share_length, share_of
from finetune_trainer.distributed.world import World


class RankSampler(Sampler[int]):
    """This process's share of the rows of another sampler, which is the same in all processes."""

    def __init__(self, rows: Any, step: int, world: World) -> None:
        """`rows` is a sampler with a length; `step` counts the sequences of all processes in a step."""
        self._rows, self._step, self._world = rows, step, world

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader before each epoch."""
        self._rows.set_epoch(epoch)

    def __len__(self) -> int:
        return share_length(len(self._rows), self._step, self._world.rank, self._world.size)

    def __iter__(self) -> Iterator[int]:
        return share_of(self._rows, self._step, self._world.rank, self._world.size)


class WithFiller:
    """The rows of a data set, and at index FILLER the first one without its labels."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index != FILLER:
            return self._rows[index]  # type: ignore[no-any-return]
        row: dict[str, Any] = self._rows[0]
        return row | {"labels": np.full_like(row["labels"], IGNORED)}


def shuffled(rows: Dataset, seed: int) -> SeedableRandomSampler:
    """Returns the order that accelerate gives to a run of one process: from the seed and the epoch alone."""
    return SeedableRandomSampler(rows, data_seed=seed)
