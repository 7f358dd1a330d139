"""The row of a slow network: how long its sums wait, and that they are sums all the same."""

import time

import pytest
import torch

from finetune_trainer.distributed.world import World
from speed.several.cases import Machine, cases
from speed.several.slow_network import SlowWorld, exchange_seconds


@pytest.mark.parametrize(("nodes", "seconds"), [(1, 0.0), (2, 0.134), (4, 0.202), (8, 0.235), (64, 0.265)])
def test_a_ring_moves_nearly_twice_the_gradient_through_each_link(nodes: int, seconds: float) -> None:
    assert exchange_seconds(168_000_000, nodes, 10.0) == pytest.approx(seconds, abs=6e-4)


def test_a_sum_waits_and_is_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[float]()
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(World, "sum_", lambda world, values: values.mul_(world.size))
    assert SlowWorld(rank=1, size=2, gigabits=10.0).sum_(torch.ones(25, dtype=torch.float64)).tolist() == [2.0] * 25
    assert waited == [pytest.approx(200 * 8 / 1e10)]


def test_one_row_has_a_slow_network() -> None:
    found = cases(Machine(2, "llama-8b", "llama-70b", 40.0))
    assert [name for name, case in found.items() if case.gigabits] == ["slow-network"]
    assert found["slow-network"].row == found["replicated"].row
