"""Attention with capped scores against its formula in fp64: sequences over several blocks, windows, grouped heads."""

import pytest
import torch

from finetune_kernels.ops import softcap_attention
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 37, 20)
CAP, TOLERANCE = 1.5, 2e-5  # fp32; 1e-6 was measured


def errors(window: int | None, cap: float, size: int) -> list[float]:
    """Relative errors of out, dq, dk and dv; the formula has the window 13, if any, and the cap `CAP`."""
    torch.manual_seed(3)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(DEVICE, torch.int32)
    sequences = PackedSequences(cu_seqlens, max(LENGTHS), sum(LENGTHS))
    merged = 2 * torch.randn(sum(LENGTHS), 4 + 2 + 2, size, device=DEVICE)  # strided views, as the layer has them
    qkv = Qkv(*torch.split(merged, [4, 2, 2], dim=1))

    exact = Qkv(*(part.double().clone().requires_grad_() for part in qkv))
    right = AttentionParams(size**-0.5, 13 if window else None, CAP)
    expected = softcap_attention.reference(exact, sequences, right)
    upstream = torch.randn(expected.shape, device=DEVICE)
    truth = [expected.detach(), *torch.autograd.grad(expected, exact, upstream.double())]

    params = AttentionParams(size**-0.5, window, cap)
    out, lse = softcap_attention.forward(qkv, sequences, params)
    gradients = softcap_attention.backward(upstream, qkv, out, lse, sequences, params)
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip((out, *gradients), truth, strict=True)]


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("window", [None, 13])
def test_outputs_and_gradients_are_those_of_the_formula(window: int | None, size: int) -> None:
    assert max(errors(window, CAP, size)) < TOLERANCE


@pytest.mark.parametrize(("window", "cap"), [(12, CAP), (13, 1.4)])
def test_a_wrong_window_or_cap_is_noticed(window: int, cap: float) -> None:
    assert min(errors(window, cap, 16)) > 100 * TOLERANCE
