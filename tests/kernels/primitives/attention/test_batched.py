"""What cuDNN's batches take, as far as a CPU can see it. test_gpu_kernels.py and test_gpu_layers.py compute."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from finetune_kernels.primitives.attention import batched, cudnn_cards, halves
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences

CPU = torch.device("cpu")
SEQUENCES = replace(PackedSequences.of_length(8, 3, CPU), comes_again=True)
PARAMS = AttentionParams(0.125)


def takes(sequences: PackedSequences = SEQUENCES, params: AttentionParams = PARAMS, *, size: int = 128) -> bool:
    return batched.takes(torch.zeros(1, 4, size), sequences, params)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card on which cuDNN is the faster one."""
    monkeypatch.setattr(cudnn_cards, "is_faster", lambda device: True)


@pytest.mark.usefixtures("card")
def test_it_takes_batches_whose_shape_comes_again() -> None:
    assert takes()
    assert takes(params=AttentionParams(0.125, window=8)), "no sequence is longer"
    assert not takes(replace(SEQUENCES, comes_again=False))


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    "change",
    [
        {"params": AttentionParams(0.125, window=7)},
        {"params": AttentionParams(0.125, sinks=torch.zeros(4))},
        {"size": 136},
        {"sequences": replace(SEQUENCES, max_seqlen=9)},
        {"sequences": replace(SEQUENCES, is_bounded=True)},
        {"sequences": replace(PackedSequences.of_length(1, halves.MAX_SEQUENCES + 1, CPU), comes_again=True)},
    ],
    ids=["window", "sinks", "heads", "mixed lengths", "bound", "many"],
)
def test_it_leaves_what_it_cannot_compute(change: dict[str, Any]) -> None:
    assert not takes(**change)


@pytest.mark.usefixtures("card")
def test_halves_of_a_pass_never_change_to_it() -> None:
    for _, part in replace(PackedSequences.of_length(8, 4, CPU), comes_again=True).halves():
        assert part.is_batch
        assert not takes(part)


def test_it_takes_nothing_where_it_is_slower() -> None:
    assert not takes()
