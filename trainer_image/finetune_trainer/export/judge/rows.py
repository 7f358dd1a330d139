"""The rows to judge on: a few, spread over the data, within a budget of tokens."""

from collections.abc import Sequence
from typing import Any

import torch

from finetune_trainer.chat.labels import Encoded

MAX_ROWS = 64
TOKENS = {"cuda": 16_384, "cpu": 2_048}
"""Budget by kind of device: on two cores, 2048 tokens take a model of 270 million weights about ten seconds."""


def choose_rows(rows: Any, device: torch.device) -> list[Encoded]:
    """At most 64 of `rows`, which have input_ids and labels, as far apart as possible and whole.

    A row that does not fit what is left of the budget is passed over; if none fits, the shortest is taken.
    """
    count = min(MAX_ROWS, len(rows))
    spread = [rows[round(index * (len(rows) - 1) / max(1, count - 1))] for index in range(count)]
    candidates = [Encoded(list(row["input_ids"]), list(row["labels"])) for row in spread]
    return _within(candidates, TOKENS[device.type])


def _within(candidates: Sequence[Encoded], budget: int) -> list[Encoded]:
    chosen = []
    for row in candidates:
        if row.supervised and len(row.input_ids) <= budget:
            chosen.append(row)
            budget -= len(row.input_ids)
    return chosen or sorted((row for row in candidates if row.supervised), key=lambda row: len(row.input_ids))[:1]
