"""Attention with capped scores against its formula in fp64: documents over several blocks, windows, grouped heads."""

from itertools import pairwise

import pytest
import torch

from finetune_kernels.ops import softcap_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 37, 20)
CAP, TOLERANCE = 1.5, 2e-5  # fp32; 1e-6 was measured


def errors(window: int | None, cap: float, size: int) -> list[float]:
    """Of out, dq, dk and dv, relative to the largest entry; the formula has no window's mistake and cap `CAP`."""
    torch.manual_seed(3)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(DEVICE, torch.int32)
    merged = 2 * torch.randn(sum(LENGTHS), 4 + 2 + 2, size, device=DEVICE)  # strided views, as the layer has them
    parts = torch.split(merged, [4, 2, 2], dim=1)
    exact = [part.double().clone().requires_grad_() for part in parts]
    pieces = [softcap_attention.reference(*(x[a:b] for x in exact), size**-0.5, CAP, 13 if window else None)
              for a, b in pairwise(ends.tolist())]  # fmt: skip
    expected = torch.cat(pieces)
    upstream = torch.randn(expected.shape, device=DEVICE)
    truth = [expected.detach(), *torch.autograd.grad(expected, exact, upstream.double())]
    out, lse = softcap_attention.forward(*parts, ends, max(LENGTHS), size**-0.5, cap, window)
    three = softcap_attention.backward(upstream, *parts, out, lse, ends, max(LENGTHS), size**-0.5, cap, window)
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip((out, *three), truth, strict=True)]


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("window", [None, 13])
def test_outputs_and_gradients_are_those_of_the_formula(window: int | None, size: int) -> None:
    assert max(errors(window, CAP, size)) < TOLERANCE


@pytest.mark.parametrize(("window", "cap"), [(12, CAP), (13, 1.4)])
def test_a_wrong_window_or_cap_is_noticed(window: int, cap: float) -> None:
    assert min(errors(window, cap, 16)) > 100 * TOLERANCE
