"""Which adapter is the best, how long a lower loss is waited for, and that checkpoints carry both."""

from pathlib import Path

import pytest
import torch
from torch import nn

from finetune_api.spec.training import EarlyStoppingSpec
from finetune_trainer.training.best_adapter import FOLDER, WEIGHTS_NAME, BestAdapter, EvaluationRecord

# losses at steps 1, 2, ...; minDelta; best step; evaluations waited at the end
RECORDS: dict[str, tuple[list[float], float, int, int]] = {
    "the first is the best": ([2.0], 0.0, 1, 0),
    "each lower one": ([2.0, 1.9, 1.8], 0.0, 3, 0),
    "higher ones are waited through": ([2.0, 2.1, 2.2], 0.0, 1, 2),
    "an equal one is no lower one": ([2.0, 2.0], 0.0, 1, 1),
    "a lower one ends the wait": ([2.0, 2.1, 1.9, 1.95], 0.0, 3, 1),
    "too little does not end it, and is the best all the same": ([2.0, 1.95, 1.93], 0.1, 3, 2),
    "little by little counts from where the wait began": ([2.0, 1.95, 1.89], 0.1, 3, 0),
}


@pytest.mark.parametrize(("losses", "min_delta", "best", "waited"), RECORDS.values(), ids=RECORDS)
def test_a_record_of_evaluations(losses: list[float], min_delta: float, best: int, waited: int) -> None:
    record = EvaluationRecord()
    for step, loss in enumerate(losses, start=1):
        record = record.after(step, loss, min_delta)
    assert (record.best_step, record.best_loss, record.waited) == (best, losses[best - 1], waited)


def adapter(value: float) -> nn.Module:
    """One weight that trains, and one that does not."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    model.bias.requires_grad_(False)
    return model


def test_the_best_comes_back_and_the_frozen_rest_stays(tmp_path: Path) -> None:
    best = BestAdapter(tmp_path, None)
    best.load(model := adapter(7))
    assert model.weight[0, 0] == 7, "before the first evaluation there is nothing to load"
    for step, (value, loss) in enumerate([(1, 2.0), (2, 1.5), (3, 1.6)], start=1):
        best.evaluated(adapter(value), step, loss)
    best.load(model)
    assert torch.equal(model.weight, adapter(2).weight)
    assert torch.equal(model.bias, adapter(7).bias)


def test_patience_ends(tmp_path: Path) -> None:
    best = BestAdapter(tmp_path, EarlyStoppingSpec(patience=2))
    ended = []
    for step, loss in enumerate([2.0, 2.1, 1.9, 2.0, 2.0]):
        best.evaluated(adapter(step), step, loss)
        ended.append(best.is_exhausted)
    assert ended == [False, False, False, False, True]
    assert not BestAdapter(tmp_path, None).is_exhausted


def test_a_checkpoint_knows_what_the_run_knew_then(tmp_path: Path) -> None:
    """Not what it learned afterwards: the next run may find something else."""
    early = EarlyStoppingSpec(patience=3)
    first = BestAdapter(tmp_path / "first", early)
    first.evaluated(adapter(1), 10, 2.0)
    first.evaluated(adapter(2), 20, 2.1)
    (tmp_path / "checkpoint").mkdir()
    first.save_into(tmp_path / "checkpoint")
    first.evaluated(adapter(3), 30, 1.0)

    second = BestAdapter(tmp_path / "second", early)
    second.restore_from(tmp_path / "checkpoint")
    assert second.record == EvaluationRecord(best_step=10, best_loss=2.0, to_undercut=2.0, waited=1)
    second.load(model := adapter(0))
    assert torch.equal(model.weight, adapter(1).weight)


def test_a_checkpoint_before_the_first_evaluation_carries_no_weights(tmp_path: Path) -> None:
    first = BestAdapter(tmp_path / "first", None)
    (tmp_path / "checkpoint").mkdir()
    first.save_into(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint" / FOLDER / WEIGHTS_NAME).exists()
    second = BestAdapter(tmp_path / "second", None)
    second.evaluated(adapter(1), 1, 1.0)
    second.restore_from(tmp_path / "checkpoint")
    assert second.record == EvaluationRecord()
