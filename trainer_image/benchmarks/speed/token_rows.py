"""Rows of random tokens, the same for every system, and the count of those that a run saw."""

import math
from typing import Any

from speed.rows import SEED, Row

SHORTEST = 16
DEVIATION = 0.8
"""Standard deviation of the logarithm of a document's length: half are below 0.73 of the mean, one in ten above 2.0."""


def dataset(row: Row, steps: int) -> Any:
    """Returns tokens and labels, enough for `steps`.

    Rows have the full length and all their tokens are supervised; or they are documents of log-normal lengths around
    `row.mean`, to be packed, of which the second half is supervised.
    """
    import torch
    from datasets import Dataset

    chance = torch.Generator().manual_seed(SEED)
    sequences = row.batch * row.accumulation * row.gpus * steps
    if not row.mean:
        tokens = torch.randint(3, 256, (sequences, row.length), generator=chance).tolist()
        return Dataset.from_dict({"input_ids": tokens, "labels": tokens})

    # A tenth more than the packs hold: the last ones are not full.
    count = math.ceil(1.1 * sequences * row.length / row.mean)
    drawn = torch.randn(count, generator=chance) * DEVIATION + math.log(row.mean) - DEVIATION**2 / 2
    lengths = drawn.exp().round().long().clamp(SHORTEST, row.length).tolist()
    documents = [torch.randint(3, 256, (length,), generator=chance).tolist() for length in lengths]
    labels = [[-100] * (len(one) // 2) + one[len(one) // 2 :] for one in documents]
    return Dataset.from_dict({"input_ids": documents, "labels": labels})


class CountedTokens:
    """Stands in for a trainer's collator, and counts tokens without padding."""

    def __init__(self, trainer: Any) -> None:
        self._collator = trainer.data_collator
        self._tokens = self._batches = 0
        trainer.data_collator = self

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Rows of a micro-batch -> the batch."""
        self._tokens += sum(len(row["input_ids"]) for row in rows)
        self._batches += 1
        return self._collator(rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collator, name)

    @property
    def per_batch(self) -> float:
        """Mean number of tokens of a micro-batch."""
        return self._tokens / self._batches
