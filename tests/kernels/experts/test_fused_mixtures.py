"""Fused layers of mixtures against transformers' own experts, whose weights have the adapters added by hand; what the
layers save is what the memory plan counts; what is wrong is noticed."""

from functools import partial
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_kernels.experts.replacing import replace_experts, stacked_experts
from finetune_kernels.experts.routers import keep_routers_in_fp32
from finetune_kernels.layers.blocks import mixture_block, tiled_mlp
from finetune_kernels.layers.blocks.mixture_block import MixtureBlock
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.layer_check import why_not_fused
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_kernels.planning.model_shape import ParameterCounts, build_shape
from finetune_kernels.primitives.expert_projection import Rows
from finetune_kernels.primitives.nf4_stack import Nf4Stack
from finetune_test_kernels.expert_adapters import adapt, by_hand, draw_router_biases
from finetune_test_kernels.quantized_mixtures import quantized_mixture
from finetune_test_kernels.tensor_checks import DEVICE, bytes_saved, largest_error, normal
from finetune_test_models.tiny_architectures import tiny_mixture

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
    model = draw_router_biases(tiny_mixture(model_type)).requires_grad_(False).to(dtype)
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
    plain, family = draw_router_biases(tiny_mixture(model_type)), expert_family_of_type(model_type)
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


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "gpt_oss", "glm4_moe", "gemma4_text"])
def test_tiles_of_tokens_change_nothing_but_the_order_of_sums(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate of the shared expert; biases; a first layer with an MLP. 48 tokens in tiles of 20: the last is smaller."""
    model, factors = quantized_mixture(model_type)
    fused = FusedLayers(model, [ActivationPolicy.SAVE_ALL] * 4, torch.float32, keep_dequantized=False)
    expected = results(model(input_ids=IDS).logits, factors)
    decoded: list[int] = []
    rows: list[int] = []
    sort, decode = Rows.sort, Nf4Stack.dequantize
    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", 20)
    monkeypatch.setattr(Rows, "sort", lambda index, experts: (rows.append(len(index)), sort(index, experts))[1])
    monkeypatch.setattr(Nf4Stack, "dequantize", lambda self, dtype: (decoded.append(1), decode(self, dtype))[1])
    layers = len(stacked_experts(model))

    for policy in set(ActivationPolicy) - {ActivationPolicy.SAVE_ALL}:
        fused.set_policies([policy] * 4)
        rows.clear()
        decoded.clear()
        found = results(model(input_ids=IDS).logits, factors)
        assert largest_error(found, expected) < TOLERANCE, policy
        assert max(rows) == 20, "no more tokens than a tile's are sorted at a time"
        assert len(rows) == 3 * 2 * layers
        assert len(decoded) == 2 * 2 * layers, "once forward and once backward, not once a tile"

    # The control: the last tile is as long as the others, so that twelve rows are taken twice. All rows are written.
    cut = tiled_mlp._tiles
    monkeypatch.setattr(
        tiled_mlp, "_tiles", lambda count: (slice(min(each.start, 28), each.stop) for each in cut(count))
    )
    assert largest_error(results(model(input_ids=IDS).logits, factors), expected) > 20 * TOLERANCE


def test_the_plan_counts_one_tile_of_experts() -> None:
    """Qwen3-30B-A3B's sizes: beyond a tile, only what grows with the residual stream and attention grows."""
    config = CONFIG_MAPPING["qwen3_moe"](
        num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    shape = build_shape(config, ParameterCounts(1, 1, quantized=True, movable_bytes=0))
    whole, tiled = (shape.working_bytes(32768, tiled=tiled) for tiled in (False, True))
    print(f"32,768 tokens: {whole / 2**30:.2f} GiB whole, {tiled / 2**30:.2f} GiB in tiles")
    assert tiled < whole / 2
    assert shape.working_bytes(2048, tiled=True) == shape.working_bytes(2048, tiled=False)


def _no_router(router: Any, rows: torch.Tensor, d_weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(rows)


def _no_gate(block: MixtureBlock, d_logit: torch.Tensor, dn2: torch.Tensor, *_: Any) -> tuple[torch.Tensor, list[Any]]:
    return dn2, []


def _no_shared(block: MixtureBlock, dm: torch.Tensor, dn2: torch.Tensor, *_: Any) -> tuple[torch.Tensor, list[Any]]:
    return dn2, []


@pytest.mark.parametrize(
    ("place", "name", "mistake"),
    [
        (mixture_block, "choose_backward", _no_router),
        (MixtureBlock, "_gate_backward", _no_gate),
        (MixtureBlock, "_shared_backward", _no_shared),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_part_of_the_gradient_that_is_left_out_is_noticed(
    place: Any, name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, factors = mixture("qwen3_5_moe_text")
    expected = from_transformers("qwen3_5_moe_text", factors)
    fuse(model)
    monkeypatch.setattr(place, name, mistake)
    assert largest_error(results(model(input_ids=IDS).logits, factors), expected) > 20 * TOLERANCE


def test_a_router_without_the_bias_of_its_block_is_noticed() -> None:
    model, factors = mixture("lfm2_moe")
    expected = from_transformers("lfm2_moe", factors)
    fused = fuse(model)
    block = fused.layers[1].mlp
    assert isinstance(block, MixtureBlock)
    block.router = partial(model.model.layers[1].feed_forward.gate, expert_bias=torch.zeros(4))
    assert largest_error(results(model(input_ids=IDS).logits, factors), expected) > 20 * TOLERANCE


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "glm4_moe", "lfm2_moe", "gemma4_text"])
def test_layers_save_of_their_experts_what_the_memory_plan_counts(model_type: str) -> None:
    model, _ = mixture(model_type, torch.bfloat16)
    fused = FusedLayers(model, [ActivationPolicy.SAVE_ALL] * 4, torch.bfloat16, keep_dequantized=False)
    shape = build_shape(model.config, ParameterCounts(1, 1, quantized=False, movable_bytes=0))

    rows = model.get_input_embeddings()(IDS).requires_grad_()  # no adapter is before the experts here

    def saved(policy: ActivationPolicy) -> int:
        fused.set_policies([policy] * 4)
        return bytes_saved(lambda: model(inputs_embeds=rows))

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
    first, weights, last = forward(rows)
    numbers, logits = sorted((first, last), key=torch.is_floating_point)
    return numbers, weights, logits


def test_what_the_row_does_not_know_is_refused() -> None:
    whole = tiny_mixture("qwen3_5_moe_text").requires_grad_(False)
    assert why_not_fused(whole) == "mlp.experts is Qwen3_5MoeExperts, not StackedExperts"
    model, _ = mixture("qwen3_5_moe_text")
    block = model.model.layers[0].mlp
    block.gate.weight.requires_grad_()
    assert why_not_fused(model) == "router weights that train"
    block.gate.weight.requires_grad_(False)
    block.register_buffer("bias", torch.ones(4))
    assert why_not_fused(model) == "mlp is a module that other Qwen3_5Moe models do not have"
