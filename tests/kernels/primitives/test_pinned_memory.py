"""Bytes that go to pieces of pinned memory come back, and take no more of it than they have."""

import pytest
import torch

from finetune_kernels.primitives import pinned_memory
from finetune_kernels.primitives.pinned_memory import copy_from_pieces, copy_to_pieces, pinned_pieces


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "PIECE", 64)


@pytest.mark.parametrize(
    ("size", "expected"), [(0, []), (1, [1]), (64, [64]), (65, [64, 1]), (200, [64, 64, 64, 8])], ids=str
)
def test_pieces_have_the_size_that_was_asked_for(size: int, expected: list[int]) -> None:
    assert [piece.numel() for piece in pinned_pieces(size, pinned=False)] == expected


@pytest.mark.parametrize("shape", [(), (1,), (31, 1), (32,), (3, 11), (5, 20)], ids=str)
def test_values_come_back(shape: tuple[int, ...]) -> None:
    pieces, x = pinned_pieces(220, pinned=False), torch.randn(shape).bfloat16()
    for piece in pieces:
        piece.fill_(7)
    copy_to_pieces(pieces, x)
    found = torch.full_like(x, 3.0)
    copy_from_pieces(pieces, found)
    assert torch.equal(found, x)
    assert all(piece.eq(7).all() for piece in pieces[-(-x.nbytes // 64) :]), "pieces behind them are left alone"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="66 bytes do not fit into pieces of 65"):
        copy_to_pieces(pinned_pieces(65, pinned=False), torch.zeros(33, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="2 bytes do not fit into pieces of 0"):
        copy_from_pieces([], torch.zeros(1, dtype=torch.bfloat16))
