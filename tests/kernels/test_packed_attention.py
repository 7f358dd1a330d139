"""Attention over packed documents, on a GPU: each document alone by the formula in fp32 is the oracle."""

import pytest
import torch

from finetune_kernels.packed_attention import packed_attention

LENGTHS = (1, 7, 64, 129, 300)
TOLERANCE = 1e-2  # bf16 inputs; 4e-3 was measured on an H200


def alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[T, H, D] and [T, H_kv, D], fp32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), value)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_documents_attend_to_themselves_only(kv_heads: int) -> None:
    torch.manual_seed(0)
    shapes = ((8, 64), (kv_heads, 64), (kv_heads, 64))
    inputs = [torch.randn(sum(LENGTHS), *shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    exact = [value.detach().float().requires_grad_() for value in inputs]
    ends = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    found = packed_attention(*inputs, ends, max(LENGTHS), 64**-0.5)
    pieces = zip(*(value.split(LENGTHS) for value in exact), strict=True)
    expected = torch.cat([alone(*piece) for piece in pieces])
    upstream = torch.randn_like(expected)
    found.backward(upstream.bfloat16())
    expected.backward(upstream)
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    for ours, truth in zip(inputs, exact, strict=True):
        assert ours.grad is not None
        assert truth.grad is not None
        assert (ours.grad - truth.grad).abs().max() < 2 * TOLERANCE * truth.grad.abs().max()
