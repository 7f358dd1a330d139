"""Numbers against an independent count."""

import random
from pathlib import Path

import pytest
from datasets import Dataset
from trl.data_utils import pack_dataset

from finetune_api.spec.inputs import DatasetSpec
from finetune_api.spec.training import TrainingSpec
from finetune_trainer.preflight import statistics
from finetune_trainer.preflight.sampling import MeasuredRow, RowSample
from finetune_trainer.preflight.statistics import DuplicateCounter, describe_tokens, histogram
from finetune_trainer.preflight.steps import count_packed, optimizer_steps, training_rows


def test_percentiles_and_shares() -> None:
    found = describe_tokens(list(range(1, 101)), [0] * 25 + [1] * 75, max_length=90)
    assert found is not None
    assert (found.p50, found.p95, found.max) == (50, 95, 100)
    assert found.truncated_share == 0.10
    assert found.unsupervised_row_share == 0.25
    assert found.supervised_share == pytest.approx(75 / (sum(range(1, 91)) + 10 * 90))
    assert describe_tokens([], [], 16) is None


@pytest.mark.parametrize(
    "lengths", [[7], [3, 3, 3], [1, 2, 10_000], sorted(random.Random(1).choices(range(900), k=500))]
)
def test_every_row_is_in_exactly_one_bin(lengths: list[int]) -> None:
    bins = histogram(lengths)
    assert sum(entry.rows for entry in bins) == len(lengths)
    for entry in bins:
        assert entry.rows == sum(entry.first <= length <= entry.last for length in lengths)


def test_duplicates_are_counted_beyond_the_first() -> None:
    counter = DuplicateCounter()
    for value in (5, -3, 5, 9, 5, -3):
        counter.add(value)
    assert counter.duplicates() == 3


def count(values: list[int]) -> DuplicateCounter:
    counter = DuplicateCounter()
    for value in values:
        counter.add(value)
    return counter


@pytest.mark.parametrize("compared_rows", [1, 7, 1_000_000])
def test_rows_of_one_source_are_found_in_another(compared_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "COMPARED_ROWS", compared_rows)
    draw = random.Random(3)
    ours, theirs = ([draw.randint(-300, 300) for _ in range(200)] for _ in range(2))
    assert count(ours).count_in(count(theirs)) == sum(value in set(theirs) for value in ours) > 0
    assert count([-(2**63), 2**63 - 1]).count_in(count([2**63 - 1])) == 1
    assert count(ours).count_in(count([])) == count([]).count_in(count(ours)) == 0


def test_rows_that_have_a_twin_are_counted_once_each() -> None:
    for values in ([], [4], [4, 4], [4, 5], [5, -3, 5, 9, 5, -3]):
        assert count(values).with_a_twin() == sum(values.count(value) > 1 for value in values)
        assert count(values).duplicates() == len(values) - len(set(values))


@pytest.mark.parametrize(("rows", "limit"), [(1, 64), (700, 64), (2300, 100)])
def test_packing_gives_as_many_sequences_as_trl(rows: int, limit: int, tmp_path: Path) -> None:
    lengths = random.Random(rows).choices(range(1, 150), k=rows)
    data = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    packed = pack_dataset(data, limit, "bfd", {"cache_file_name": str(tmp_path / "packed.arrow")})
    assert count_packed(lengths, limit) == len(packed)


@pytest.mark.parametrize(
    ("sequences", "spec", "steps"),
    [
        (16, {"batchSize": 2, "gradientAccumulation": 4}, 2),
        (16, {}, 2),
        (17, {"batchSize": 2, "gradientAccumulation": 4}, 3),
        (1, {}, 1),
        (100, {"maxSteps": 7}, 7),
        (16, {"batchSize": 2, "gradientAccumulation": 4, "epochs": 2.5}, 5),
    ],
)
def test_optimizer_steps(sequences: int, spec: dict[str, float], steps: int) -> None:
    assert optimizer_steps(sequences, TrainingSpec.model_validate(spec)) == steps


def test_held_out_rows_do_not_train() -> None:
    spec = DatasetSpec.model_validate({"source": "file:///d", "evaluation": {"fraction": 0.1}})
    assert [training_rows(count, spec) for count in (1, 2, 40)] == [1, 1, 36]
    split = DatasetSpec.model_validate({"source": "hf://org/data", "evaluation": {"split": "validation"}})
    assert training_rows(40, split) == 40


def test_the_sample_is_bounded_and_spread_over_all_rows() -> None:
    sample = RowSample(budget_characters=1000)
    for number in range(50_000):
        if sample.wants(number):
            sample.add(MeasuredRow(number, 10, 1, 1))
    assert 40 <= len(sample.rows) <= 100
    assert not sample.is_complete
    gaps = [after.number - before.number for before, after in zip(sample.rows, sample.rows[1:], strict=False)]
    assert max(gaps) < 4 * 50_000 / len(sample.rows)
    assert sum(row.number for row in sample.rows) / len(sample.rows) == pytest.approx(25_000, rel=0.15)


@pytest.mark.parametrize("size", [100, 2_000, 20_000])
def test_of_many_rows_hundreds_are_enough_and_few_are_encoded_in_vain(size: int) -> None:
    rows, budget = 400_000_000 // size, 4_000_000
    sample, taken = RowSample(budget, rows * size), 0
    for number in range(rows):
        if sample.wants(number):
            sample.add(MeasuredRow(number, size, 1, 1))
            taken += 1
    assert budget // 8 <= len(sample.rows) * size <= budget
    assert len(sample.rows) >= min(500, budget // 2 // size)
    assert len(sample.rows) <= 1000 or len(sample.rows) * size <= budget // 4
    assert taken <= 1.5 * len(sample.rows) + 1000
