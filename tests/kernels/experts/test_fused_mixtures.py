"""Fused layers of mixtures against transformers' own experts, whose weights have the adapters added by hand; what the
layers save is what the memory plan counts; what is wrong is noticed."""

from functools import partial
from typing import Any

import pytest
import torch

from finetune_kernels.experts.replacing import replace_experts
from finetune_kernels.experts.routers import keep_routers_in_fp32
from finetune_kernels.layers.blocks.mixture_block import MixtureBlock
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.layer_check import why_not_fused
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_kernels.planning.model_shape import ParameterCounts, build_shape
from finetune_test_kernels.expert_adapters import adapt, by_hand, draw_router_biases
from finetune_test_kernels.tensor_checks import DEVICE, largest_error, normal
from finetune_test_models.tiny_architectures import tiny_architecture

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="in fp32, by the kernels' formulas"),
    pytest.mark.usefixtures("in_pytorch"),
]
TOLERANCE = 2e-4  # as in test_families.py; at most 2e-5 was measured
IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(1))
MIXTURES = (
    "qwen3_5_moe_text", "qwen3_next", "granitemoehybrid", "mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss",
    "glm4_moe", "ernie4_5_moe", "lfm2_moe",
)  # fmt: skip
Results = dict[str, torch.Tensor]


def mixture(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with our experts and random adapters on them, and these adapters' factors."""
    model = draw_router_biases(tiny_architecture(model_type)).requires_grad_(False).to(dtype)
    assert replace_experts(model) == keep_routers_in_fp32(model) >= 3, "the first layer may have an MLP"
    family = expert_family_of_type(model_type)
    assert family is not None
    return model, adapt(model, family)


def fuse(model: Any, policy: ActivationPolicy = ActivationPolicy.SAVE_ALL) -> FusedLayers:
    assert why_not_fused(model) is None
    return FusedLayers(model, [policy] * 4, torch.float32, keep_dequantized=False)


def results(logits: torch.Tensor, factors: dict[str, torch.Tensor]) -> Results:
    found = torch.autograd.grad(logits, list(factors.values()), normal(*logits.shape, seed=5))
    return dict(zip(factors, found, strict=True)) | {"logits": logits.detach()}


def from_transformers(model_type: str, factors: dict[str, torch.Tensor]) -> Results:
    plain, family = draw_router_biases(tiny_architecture(model_type)), expert_family_of_type(model_type)
    plain.requires_grad_(False)
    assert family is not None
    copies = {name: value.detach().clone().requires_grad_() for name, value in factors.items()}
    return results(by_hand(plain, copies, family, {"input_ids": IDS}), copies)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_logits_and_gradients_are_those_of_transformers(model_type: str) -> None:
    model, factors = mixture(model_type)
    expected = from_transformers(model_type, factors)
    fused = fuse(model)
    for policy in ActivationPolicy:
        fused.set_policies([policy] * 4)
        found = results(model(input_ids=IDS).logits, factors)
        assert largest_error(found, expected) < TOLERANCE, policy


def _no_router(block: MixtureBlock, n2: torch.Tensor, d_weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(n2)


def _no_gate(block: MixtureBlock, d_logit: torch.Tensor, dn2: torch.Tensor, *_: Any) -> tuple[torch.Tensor, list[Any]]:
    return dn2, []


def _no_shared(block: MixtureBlock, dm: torch.Tensor, dn2: torch.Tensor, *_: Any) -> tuple[torch.Tensor, list[Any]]:
    return dn2, []


@pytest.mark.parametrize(
    ("name", "mistake"),
    [("_router_backward", _no_router), ("_gate_backward", _no_gate), ("_shared_backward", _no_shared)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_part_of_the_gradient_that_is_left_out_is_noticed(
    name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, factors = mixture("qwen3_5_moe_text")
    expected = from_transformers("qwen3_5_moe_text", factors)
    fuse(model)
    monkeypatch.setattr(MixtureBlock, name, mistake)
    assert largest_error(results(model(input_ids=IDS).logits, factors), expected) > 20 * TOLERANCE


def test_a_router_without_the_bias_of_its_block_is_noticed() -> None:
    model, factors = mixture("lfm2_moe")
    expected = from_transformers("lfm2_moe", factors)
    fused = fuse(model)
    block = fused.layers[1].mlp
    assert isinstance(block, MixtureBlock)
    block.router = partial(model.model.layers[1].feed_forward.gate, expert_bias=torch.zeros(4))
    assert largest_error(results(model(input_ids=IDS).logits, factors), expected) > 20 * TOLERANCE


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "glm4_moe", "lfm2_moe"])
def test_layers_save_of_their_experts_what_the_memory_plan_counts(model_type: str) -> None:
    model, _ = mixture(model_type, torch.bfloat16)
    fused = FusedLayers(model, [ActivationPolicy.SAVE_ALL] * 4, torch.bfloat16, keep_dequantized=False)
    shape = build_shape(model.config, ParameterCounts(1, 1, quantized=False, movable_bytes=0))

    rows = model.get_input_embeddings()(IDS).requires_grad_()  # no adapter is before the experts here

    def saved(policy: ActivationPolicy) -> int:
        seen = dict[int, int]()

        def note(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        fused.set_policies([policy] * 4)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(inputs_embeds=rows)
        return sum(seen.values())

    kept = saved(ActivationPolicy.SAVE_ALL) - saved(ActivationPolicy.RECOMPUTE_MLP)
    whole, less = (
        shape.saved_by([policy] * 4) for policy in (ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_MLP)
    )
    assert kept == pytest.approx(IDS.numel() * (whole - less), rel=0.02)


def test_routers_compute_in_fp32_within_autocast() -> None:
    model, _ = mixture("qwen3_5_moe_text")
    router, n = model.model.layers[0].mlp.gate, normal(8, 64, dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(n.float(), router.weight)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, _ = router(n)
        assert torch.nn.functional.linear(n.float(), router.weight).dtype is torch.bfloat16, "the control"
    assert torch.equal(logits, expected)


def test_routers_may_name_the_experts_first() -> None:
    model, factors = mixture("granitemoe")
    fuse(model)
    expected = results(model(input_ids=IDS).logits, factors)
    for layer in model.model.layers:
        router = layer.block_sparse_moe.router
        router.forward = partial(_numbers_first, router.forward)
    found = results(model(input_ids=IDS).logits, factors)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _numbers_first(forward: Any, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Outputs of a router of Granite in older versions of transformers."""
    numbers, logits = sorted(forward(rows)[::2], key=torch.is_floating_point)
    return numbers, forward(rows)[1], logits


def test_what_the_row_does_not_know_is_refused() -> None:
    whole = tiny_architecture("qwen3_5_moe_text").requires_grad_(False)
    assert why_not_fused(whole) == "mlp.experts is Qwen3_5MoeExperts, not StackedExperts"
    model, _ = mixture("qwen3_5_moe_text")
    block = model.model.layers[0].mlp
    block.gate.weight.requires_grad_()
    assert why_not_fused(model) == "router weights that train"
    block.gate.weight.requires_grad_(False)
    block.register_buffer("bias", torch.ones(4))
    assert why_not_fused(model) == "mlp is a module that other Qwen3_5Moe models do not have"
