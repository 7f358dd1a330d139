"""Every family beside its fused layers: single modules with kernels, packed attention, the loss through the head."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from finetune_kernels.layers.packed_attention import use_packed_attention
from finetune_kernels.layers.patching import patch_model
from finetune_kernels.layers.supervised_loss import fused_supervised_loss, has_plain_head
from finetune_kernels.mixers.isolation import isolate_documents
from finetune_kernels.planning.families import FAMILIES, MLP_FAMILIES
from finetune_kernels.planning.family import Family
from finetune_test_kernels.family_settings import documents_pass, family_model
from finetune_test_kernels.tensor_checks import DEVICE, largest_error

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="in fp32, in Triton's interpreter")
TOLERANCE = 2e-4  # as in test_families.py
DOCUMENTS = (7, 2, 5)


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.prefix)
def test_modules_and_packed_attention(family: Family) -> None:
    model = family_model(family)
    expected = documents_pass(model, DOCUMENTS, packed=False)
    report = patch_model(model, keep_dequantized=False)
    assert (report.norms > 0) == (family.norm_kind == "rms"), report
    assert (report.mlps > 0) == (family.mlp in MLP_FAMILIES), report

    assert (isolate_documents(model.get_base_model()) > 0) == (family.mixer is not None)
    reason = use_packed_attention(model.get_base_model())
    if reason is None:
        assert largest_error(documents_pass(model, DOCUMENTS, packed=True), expected) < TOLERANCE
    else:
        assert reason == "layers of StableLm do not tell attention where documents end"
    assert largest_error(documents_pass(model, DOCUMENTS, packed=False), expected) < TOLERANCE


@pytest.mark.parametrize("prefix", ["Llama", "Granite", "GraniteMoeHybrid", "Cohere2", "Gemma2", "Qwen3_5", "FalconH1"])
def test_the_loss_through_the_head(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(row for row in FAMILIES if row.prefix == prefix)
    causal: PreTrainedModel | Any = family_model(family).get_base_model()
    assert has_plain_head(causal)
    tokens = torch.arange(9, device=DEVICE).unsqueeze(0)
    labels = (tokens * 5 % 24).masked_fill(tokens % 3 == 1, -100)
    supervised = (labels[0, 1:] != -100).nonzero().squeeze(1)
    inputs = {"input_ids": tokens, "position_ids": tokens}
    weights = [value for value in causal.parameters() if value.requires_grad]

    losses = [
        causal(**inputs, labels=labels).loss,
        fused_supervised_loss(causal, inputs, labels, supervised, None),
    ]
    gradients = [torch.autograd.grad(loss, weights) for loss in losses]
    assert abs(losses[1].item() - losses[0].item()) < 1e-5 * losses[0].item()
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_head_with_a_bias_is_not_plain() -> None:
    family = next(row for row in FAMILIES if row.prefix == "Phi")
    assert not has_plain_head(family_model(family))
