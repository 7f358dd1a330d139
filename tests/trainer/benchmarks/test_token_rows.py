"""The benchmark's rows of tokens: whole ones, and documents of many lengths."""

import statistics
from types import SimpleNamespace

import pytest

from speed.rows import Row
from speed.token_rows import SHORTEST, CountedTokens, dataset


def test_whole_rows_have_the_full_length_and_are_supervised() -> None:
    found = dataset(Row("tiny", 64, 2, 3), steps=4)
    assert found.num_rows == 24
    assert {len(one) for one in found["input_ids"]} == {64}
    assert found["labels"] == found["input_ids"]


def test_documents_have_many_lengths_around_their_mean_and_their_second_half_is_supervised() -> None:
    row = Row("tiny", 2048, 2, 4, mean=500)
    found = dataset(row, steps=40)
    lengths = [len(one) for one in found["input_ids"]]
    assert 450 < statistics.mean(lengths) < 530
    assert min(lengths) >= SHORTEST
    assert max(lengths) == 2048
    assert statistics.median(lengths) < 0.8 * statistics.mean(lengths)
    assert sum(lengths) >= row.tokens * 40

    for tokens, labels in zip(found["input_ids"], found["labels"], strict=True):
        half = len(tokens) // 2
        assert labels[:half] == [-100] * half
        assert labels[half:] == tokens[half:]


def test_tokens_are_counted_where_batches_are_made() -> None:
    trainer = SimpleNamespace(data_collator=len)
    counted = CountedTokens(trainer)
    assert trainer.data_collator([{"input_ids": [1] * 5}, {"input_ids": [1] * 7}]) == 2
    trainer.data_collator([{"input_ids": [1] * 4}, {"input_ids": [1] * 4}])
    assert counted.per_batch == pytest.approx(10.0)
