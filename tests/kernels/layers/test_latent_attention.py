"""Latent attention beside what test_families.py compares: it saves what the memory plan counts, and a mistake in its
heads is noticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune_kernels.layers.blocks.latent_attention import LatentHeads
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.layer_check import why_not_fused
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import FAMILIES
from finetune_kernels.planning.model_shape import ParameterCounts, build_shape
from finetune_test_kernels.family_settings import documents_pass, family_model
from finetune_test_kernels.tensor_checks import DEVICE, bytes_saved, largest_error
from finetune_test_models.tiny_architectures import tiny_architecture

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="in fp32, by the kernels' formulas"),
    pytest.mark.usefixtures("in_pytorch"),
]
TOLERANCE = 2e-4  # as in test_families.py
DOCUMENTS = (7, 2, 5)
IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(1))
split, merge = LatentHeads.split, LatentHeads.merge


def _one_head(heads: LatentHeads, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradient of the keys' shared part, of the first head only."""
    d_q, d_kv, _ = split(heads, gradient)
    k = gradient.view(-1, 3, heads.heads.query, heads.heads.size)[:, 1]
    return d_q, d_kv, k[:, 0, : heads.rotated]


def _nothing_shared(heads: LatentHeads, *parts: torch.Tensor) -> torch.Tensor:
    q, kv, turned = parts
    return merge(heads, q, kv, torch.zeros_like(turned))


def _other_end(heads: LatentHeads, *parts: torch.Tensor) -> torch.Tensor:
    """Queries whose turned part is taken from the front of a head."""
    q, kv, turned = parts
    rolled = q.view(q.shape[0], -1, heads.heads.size).roll(heads.rotated, 2)
    return merge(heads, rolled.flatten(1), kv, turned)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [("split", _one_head), ("merge", _nothing_shared), ("merge", _other_end)],
    ids=["one head", "nothing shared", "the other end"],
)
def test_a_mistake_in_the_heads_is_noticed(
    name: str, mistake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model(next(row for row in FAMILIES if row.prefix == "Youtu"))
    expected = documents_pass(model, DOCUMENTS, packed=False)
    causal, policies = model.get_base_model(), [ActivationPolicy.SAVE_ALL] * 2
    FusedLayers(causal, policies, torch.float32, keep_dequantized=False)
    assert largest_error(documents_pass(model, DOCUMENTS, packed=True), expected) < TOLERANCE, "the control"
    monkeypatch.setattr(LatentHeads, name, mistake)
    assert largest_error(documents_pass(model, DOCUMENTS, packed=True), expected) > 20 * TOLERANCE


@pytest.mark.parametrize(("model_type", "changes"), [("youtu", {}), ("youtu", {"q_lora_rank": None})], ids=str)
def test_it_saves_latent_vectors_as_the_memory_plan_counts(model_type: str, changes: dict[str, Any]) -> None:
    model = tiny_architecture(model_type, v_head_dim=24, **changes).requires_grad_(False).to(torch.bfloat16)
    assert why_not_fused(model) is None
    fused = FusedLayers(model, [ActivationPolicy.SAVE_ALL] * 4, torch.bfloat16, keep_dequantized=False)
    shape = build_shape(model.config, ParameterCounts(1, 1, quantized=False, movable_bytes=0))
    rows = model.get_input_embeddings()(IDS).requires_grad_()

    def saved(policy: ActivationPolicy) -> int:
        fused.set_policies([policy] * 4)
        return bytes_saved(lambda: model(inputs_embeds=rows))

    kept = saved(ActivationPolicy.RECOMPUTE_MLP) - saved(ActivationPolicy.RECOMPUTE_ALL)
    planned = [
        shape.saved_by([policy] * 4) for policy in (ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.RECOMPUTE_ALL)
    ]
    assert shape.latent is not None
    assert kept == pytest.approx(IDS.numel() * (planned[0] - planned[1]), rel=0.02)
    whole = 3 * 4 * (16 + 16)
    assert shape.latent.narrow < whole, "q, k and v themselves"
