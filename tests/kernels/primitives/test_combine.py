"""Sums of the sorted rows of each token, by the formula: odd sizes, rows of several blocks, with weights or not."""

import pytest
import torch

from finetune_kernels.primitives.expert_projection import Rows
from finetune_kernels.primitives.grouped.token_sums import combine, reference
from finetune_test_kernels.tensor_checks import DEVICE, normal, relative_error

TOLERANCE = 1e-6  # fp32; sums in another order


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("tokens", "chosen", "hidden"), [(5, 3, 70), (1, 1, 8), (3, 8, 2049)])
def test_rows_come_to_their_tokens(tokens: int, chosen: int, hidden: int, weighted: bool) -> None:
    index = torch.randint(0, 4, (tokens, chosen), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = Rows.sort(index, 4)
    weights = normal(tokens, chosen, seed=1) if weighted else None
    whole = normal(tokens, chosen, hidden)
    z, places = whole.flatten(0, 1)[rows.order], rows.places.view(tokens, chosen)

    expected = whole.sum(1) if weights is None else (whole * weights.unsqueeze(2)).sum(1)
    for compute in (combine, reference):
        assert relative_error(compute(z, places, weights), expected) < TOLERANCE

    if tokens > 1:
        assert relative_error(combine(z, places.roll(1, 0), weights), expected) > 0.1, "another token's rows"


def test_places_undo_the_order() -> None:
    index = torch.randint(0, 6, (40, 2), generator=torch.Generator().manual_seed(2))
    rows = Rows.sort(index, 6)
    assert torch.equal(rows.order[rows.places], torch.arange(80))
    assert torch.equal(rows.experts[rows.places].view(40, 2), index)
