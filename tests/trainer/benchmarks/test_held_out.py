"""The comparison of held-out losses: its rule, its rows, and the loss of an exported model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from held_out.bases import CONFIGS, Reading, make_base
from held_out.cell import supervised_loss
from held_out.conversations import split
from held_out.verdict import compare, table, verdict

VARIANTS = ("bf16", "fp8")


def rows(model: str, first: list[float], second: list[float]) -> list[dict[str, Any]]:
    """Rows as the CSV file has them: text."""
    return [
        {"model": model, "variant": variant, "seed": str(seed), "exported_loss": str(loss)}
        for variant, losses in zip(VARIANTS, (first, second), strict=True)
        for seed, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("second", "holds"),
    [
        ([1.01, 2.01, 3.01], True),
        ([1.49, 2.49, 3.49], True),
        ([1.51, 2.51, 3.51], False),
        ([0.49, 1.49, 2.49], False),  # better by as much is a difference, too
        ([2.0, 3.0, 1.0], True),  # paired differences cancel out
    ],
)
def test_the_mean_of_paired_differences_is_below_half_of_the_spread(second: list[float], holds: bool) -> None:
    (found,) = compare(rows("a", [1.0, 2.0, 3.0], second), VARIANTS, "exported_loss")
    assert found.spread == 1.0
    assert found.is_equal is holds
    assert table([found], VARIANTS).endswith("yes" if holds else "no")


def test_one_model_that_differs_decides_and_missing_ones_are_told() -> None:
    known = rows("a", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) + rows("b", [1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    found = compare(known, VARIANTS, "exported_loss")
    assert verdict(found, 2) == "the rule does not hold for b"
    assert verdict(found[:1], 1) == "the rule holds for all 1 models"
    assert verdict(found, 3) == "no verdict: only 2 of 3 models have pairs"


def test_two_seeds_are_too_few_and_a_seed_without_its_pair_is_left_out() -> None:
    unpaired = [
        row for row in rows("a", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) if (row["variant"], row["seed"]) != ("fp8", "2")
    ]
    (found,) = compare(unpaired, VARIANTS, "exported_loss")
    assert list(found.first) == [1.0, 2.0]
    assert not found.is_equal


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "all.jsonl"
    lengths = [2, 900, 3, 4, 5, 1000, 6]
    lines = [
        {"messages": [{"role": "user", "content": f"hi {index}" * length}, {"role": "assistant", "content": "yes"}]}
        for index, length in enumerate(lengths)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_no_conversation_has_two_uses(conversations: Path, tmp_path: Path) -> None:
    parts = split(conversations, held_out=2)
    assert [len(part) for part in (parts.reading, parts.train, parts.held_out)] == [2, 3, 2]

    written = parts.write_rows(tmp_path)
    lines = [line for file in (written.train, written.held_out) for line in file.read_text().splitlines()]
    assert len({*lines, *map(json.dumps, parts.reading)}) == 7
    with pytest.raises(ValueError, match="more than 5 conversations"):
        split(conversations, held_out=5)


def test_padding_changes_no_loss_and_prompts_count_for_nothing(conversations: Path, tmp_path: Path) -> None:
    reading = Reading(steps=2, rows=2, length=16, vocabulary=300)
    loss = make_base("tiny-llama", split(conversations, held_out=2).reading, tmp_path, reading)
    assert 0 < loss < 10
    assert CONFIGS["tiny-llama"].vocab_size <= 300

    draw = torch.Generator().manual_seed(0)
    encoded = []
    for length in (5, 12, 9):
        tokens = torch.randint(3, 200, (length,), generator=draw).tolist()
        encoded.append({"input_ids": tokens, "labels": [-100] * 3 + tokens[3:]})

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    total = 0.0
    for row in encoded:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, 2:-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][3:]), reduction="sum").item()
    assert supervised_loss(tmp_path, Dataset.from_list(encoded)) == pytest.approx(total / (5 + 12 + 9 - 9), rel=1e-5)
