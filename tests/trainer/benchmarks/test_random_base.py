"""A base that is made layer by layer for a measurement is the same wherever its layers lie."""

import torch

from finetune_trainer.stages.streamed_loading import InHostMemory
from speed.rows import SHAPES
from speed.several.cases import Machine, cases, streamed_cases
from speed.several.random_base import random_base

CPU = torch.device("cpu")


def test_layers_in_host_memory_are_those_of_a_whole_base() -> None:
    whole, streamed = (random_base(SHAPES["tiny"], CPU, placement) for placement in (None, InHostMemory(3)))
    assert (len(whole.streamed), whole.streamed.limit) == (0, 4)
    assert len(streamed.streamed) == 3
    tokens = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(streamed.model(tokens).logits, whole.model(tokens).logits)


def test_rows_have_one_name_each() -> None:
    machine = Machine(1, "tiny", "tiny", 24.0)
    assert not cases(machine).keys() & streamed_cases(machine).keys()
    assert {case.row.card_gib for case in streamed_cases(machine).values()} == {None, 24.0}
