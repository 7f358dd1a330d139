"""Rows of a micro-batch end to end: what TRL's own collator makes of the same rows, and where there is loss."""

from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune_trainer.training.collator import Collator, collate_and_count, collate_packed, collate_padded

Rows = list[dict[str, Any]]


def row(*lengths: int, packed: bool) -> dict[str, Any]:
    tokens = np.arange(3, 3 + sum(lengths))
    return {"input_ids": tokens, "labels": tokens.copy()} | ({"seq_lengths": list(lengths)} if packed else {})


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([row(5, packed=False), row(1, packed=False), row(9, packed=False)], id="rows of one document"),
        pytest.param([row(4, 1, 6, packed=True), row(11, packed=True)], id="packed rows"),
    ],
)
def test_a_batch_is_the_one_that_trl_makes(rows: Rows) -> None:
    expected = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    found = collate_packed(rows)
    assert found.keys() - expected.keys() == {"supervised"}
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def test_supervised_positions_are_those_whose_next_token_has_a_label() -> None:
    one, two = row(5, packed=False), row(4, packed=False)
    one["labels"][3] = -100
    two["labels"][:2] = -100
    batch = collate_packed([one, two])
    assert batch["supervised"].tolist() == [0, 1, 3, 6, 7]
    assert (batch["labels"][0, batch["supervised"] + 1] != -100).all()
    assert batch["labels"][0, 5] == -100, "the first token of a document is never predicted"


def test_a_batch_without_labels_has_no_supervised_position() -> None:
    blank = row(6, packed=False)
    blank["labels"][:] = -100
    assert collate_packed([blank])["supervised"].numel() == 0


def test_padded_rows_have_a_mask_and_no_label_in_the_padding() -> None:
    long, short = row(5, packed=False), row(3, packed=False)
    short["labels"][1] = -100
    batch = collate_padded([long, short])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7], [3, 4, 5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 4, 5, 6, 7], [-100, -100, 5, -100, -100]]
    assert batch["supervised"].tolist() == [0, 1, 2, 3, 6], "positions of the flattened batch"


def test_the_longest_row_may_come_last() -> None:
    batch = collate_padded([row(2, packed=False), row(4, packed=False)])
    assert batch["supervised"].tolist() == [0, 4, 5, 6], "no position is the last of its row"


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_tokens_are_counted_without_the_padding(collate: Collator) -> None:
    counted = collate_and_count(collate, [row(5, packed=False), row(2, packed=False)])
    assert (counted["tokens"], type(counted["tokens"])) == (7, int)
