"""Each family's row against transformers: logits of a small random model, and the gradients of adapters on its experts,
which are added by hand to transformers' own."""

import pytest
import torch

from finetune_kernels.experts import replacing
from finetune_kernels.experts.replacing import expert_modules, replace_experts, why_not_replaced
from finetune_kernels.experts.routers import keep_routers_in_fp32
from finetune_kernels.planning.expert_families import EXPERT_FAMILIES, ExpertFamily
from finetune_test_kernels.expert_adapters import adapt, by_hand
from finetune_test_kernels.tensor_checks import normal, relative_error
from finetune_test_models.tiny_architectures import tiny_architecture, tiny_mixture

TOLERANCE = 2e-5  # fp32 through four layers; at most 3e-6 was measured
IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(1))
IN_FULL = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "glm4_moe", "deepseek_v3", "olmoe", "granitemoe")
"""Families whose gradients are compared, too; the others have the same experts."""


@pytest.mark.parametrize("family", EXPERT_FAMILIES, ids=lambda family: family.model_type)
def test_logits_are_those_of_transformers(family: ExpertFamily) -> None:
    model = tiny_mixture(family.model_type)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert why_not_replaced(model) is None
        layers = replace_experts(model)
        assert layers == keep_routers_in_fp32(model) > 0
        found = model(input_ids=IDS).logits
    assert relative_error(found, expected) < TOLERANCE
    assert len(expected.argmax(-1).unique()) > 8, "a collapsed model proves nothing"


@pytest.mark.parametrize("model_type", IN_FULL)
def test_adapters_train_as_if_they_were_added_to_the_weights(model_type: str) -> None:
    family = next(each for each in EXPERT_FAMILIES if each.model_type == model_type)
    plain, ours = tiny_mixture(model_type), tiny_mixture(model_type)
    for model in (plain, ours):
        model.requires_grad_(False)
    replace_experts(ours)
    factors = adapt(ours, family)
    direction = normal(*IDS.shape, plain.config.vocab_size, seed=5, device="cpu")

    found = ours(input_ids=IDS).logits
    (found * direction).sum().backward()
    copies = {name: value.detach().clone().requires_grad_() for name, value in factors.items()}
    expected = by_hand(plain, copies, family, {"input_ids": IDS})
    (expected * direction).sum().backward()

    assert relative_error(found, expected) < TOLERANCE
    for name, value in factors.items():
        assert value.grad is not None
        assert copies[name].grad is not None
        assert relative_error(value.grad, copies[name].grad) < 10 * TOLERANCE, name

    with torch.no_grad():
        without = plain(input_ids=IDS).logits
    assert relative_error(found, without) > 0.01, "the adapters change something"


def test_what_does_not_fit_its_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_architecture("qwen3_moe")
    model.config.hidden_act = "relu"
    assert (why_not_replaced(model) or "").startswith("activation relu, not silu or swish or gelu")
    model.config.hidden_act = "silu"

    _, experts = next(expert_modules(model))
    experts.is_concatenated = False
    assert why_not_replaced(model) == "is_concatenated of Qwen3MoeExperts is False, not True"
    experts.is_concatenated = True
    monkeypatch.setattr(type(experts), "_apply_gate", lambda self, y: y, raising=False)
    assert why_not_replaced(model) == "Qwen3MoeExperts has a gate of its own"
    monkeypatch.undo()
    experts.extra = torch.nn.Parameter(torch.zeros(2))
    assert why_not_replaced(model) == "Qwen3MoeExperts has the parameters down_proj, extra, gate_up_proj"


def test_unknown_experts_are_left_and_named() -> None:
    model = tiny_architecture("afmoe")
    assert why_not_replaced(model) == "the kernels do not know the experts of afmoe"
    assert replace_experts(model) == 0
    assert why_not_replaced(tiny_architecture("llama")) is None


def test_a_row_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in another order compute something else; so the comparison of logits judges the row."""
    model = tiny_architecture("qwen3_moe")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        wrong = ExpertFamily("Qwen3Moe", "qwen3_moe", is_interleaved=True)
        monkeypatch.setattr(replacing, "expert_family_of_type", lambda model_type: wrong)
        replace_experts(model)
        assert relative_error(model(input_ids=IDS).logits, expected) > 0.01


def test_routers_choose_in_fp32() -> None:
    model = tiny_architecture("qwen3_moe").to(torch.bfloat16)
    replace_experts(model)
    router = model.model.layers[0].mlp.gate
    before = router.weight.clone()
    keep_routers_in_fp32(model)
    assert router.weight.dtype is torch.float32
    assert torch.equal(router.weight, before.float())
    assert not router.weight.requires_grad

    states = torch.randn(64, 64).bfloat16()
    logits, weights, _ = router(states)
    assert logits.dtype is weights.dtype is torch.float32
    assert torch.equal(logits, states.float() @ router.weight.T)
    with torch.no_grad():
        assert model(input_ids=IDS).logits.isfinite().all(), "experts take fp32 weights beside bfloat16 states"
