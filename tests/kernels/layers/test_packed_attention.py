"""Attention over packed documents, on a GPU: each document alone by the formula in fp32 is the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_kernels.layers.packed_attention import use_packed_attention
from finetune_kernels.ops.attention import attention
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_test_models.tiny_model import make_tiny_model

SMALL: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 3, "attn_logit_softcapping": 1.5},
    "gemma3": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
}
LENGTHS = (1, 7, 64, 129, 300)
TOLERANCE = 1e-2  # bf16 inputs; 4e-3 was measured on an H200


def alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    """[T, H, D] and [T, H_kv, D], fp32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    at = torch.arange(scores.shape[1], device=scores.device)
    back = at[:, None] - at
    unseen = (back < 0) | (back >= (params.window or scores.shape[1]))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), value)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "params", [AttentionParams(0.125), AttentionParams(0.125, window=50), AttentionParams(0.125, 50, softcap=2.0)]
)
@pytest.mark.parametrize(("kv_heads", "size"), [(8, 64), (2, 64), (1, 80), (2, 96), (8, 112), (4, 192), (4, 256)])
def test_documents_attend_to_themselves_only(kv_heads: int, size: int, params: AttentionParams) -> None:
    torch.manual_seed(0)
    shapes = ((8, size), (kv_heads, size), (kv_heads, size))
    inputs = [torch.randn(sum(LENGTHS), *shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    exact = [value.detach().float().requires_grad_() for value in inputs]
    ends = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    found = attention(Qkv(*inputs), PackedSequences(ends, max(LENGTHS), sum(LENGTHS)), params)
    pieces = zip(*(value.split(LENGTHS) for value in exact), strict=True)
    expected = torch.cat([alone(*piece, params) for piece in pieces])
    upstream = torch.randn_like(expected)
    found.backward(upstream.bfloat16())
    expected.backward(upstream)

    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    for ours, truth in zip(inputs, exact, strict=True):
        assert ours.grad is not None
        assert truth.grad is not None
        assert (ours.grad - truth.grad).abs().max() < 2 * TOLERANCE * truth.grad.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_rows_that_are_not_packed_are_attended_to_as_before(family: str, tmp_path: Path) -> None:
    """Left-padded rows, as generation has them: windows and caps included."""
    path = make_tiny_model(tmp_path, family=family, texts=["a few words"], **SMALL.get(family, {}))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens, mask = torch.arange(3, 27).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    padding, positions = {"attention_mask": mask}, {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        expected = [model(tokens, **padding, **positions).logits, model(tokens[:1]).logits]
        assert use_packed_attention(model) is None
        found = [model(tokens, **padding, **positions).logits, model(tokens[:1]).logits]

    for ours, theirs in zip(found, expected, strict=True):
        seen = mask[: ours.shape[0]].bool()
        assert (ours[seen] - theirs[seen]).abs().max() < 1e-4 * theirs.abs().max()  # fp32; 2e-6 was measured
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.1
    with torch.no_grad():
        assert (model(tokens[:1]).logits - expected[1]).abs().max() > 1e-2 * expected[1].abs().max()
