"""The shapes of Gemma 4 as published, in small: fused layers compute what transformers computes, under every policy and
in tiles, packed. Keys and values cross layers with their gradients, and router, experts and MLP each read the residual
stream; a gradient that is lost and a wrong input are noticed."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from finetune_kernels.experts.replacing import stacked_experts
from finetune_kernels.experts.routers import keep_routers_in_fp32
from finetune_kernels.layers import decoder_layer
from finetune_kernels.layers.blocks import mlp_beside_experts, tiled_mlp
from finetune_kernels.layers.blocks.mlp_beside_experts import MlpBesideExperts
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.layer_check import why_not_fused
from finetune_kernels.planning import families
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import family_of_type
from finetune_kernels.planning.model_shape import ParameterCounts, build_shape
from finetune_kernels.primitives.adapter_dropout import new_dropout_seed
from finetune_test_kernels.family_settings import documents_pass, family_model, rows_pass
from finetune_test_kernels.small_layers import drop_by
from finetune_test_kernels.tensor_checks import DEVICE, bytes_saved, largest_error

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU in bfloat16: test_gpu_layers.py"),
    pytest.mark.usefixtures("in_pytorch"),
]
TOLERANCE = 2e-4  # fp32, as in test_families.py
DOCUMENTS = (7, 2, 5)
"""Longer than windows."""
SLIDING, FULL = "sliding_attention", "full_attention"
SHAPES: dict[str, dict[str, Any]] = {
    "E2B": {
        "num_hidden_layers": 5, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL], "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True, "num_key_value_heads": 1, "num_global_key_value_heads": None,
    },
    "31B": {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "attention_bias": False},
    "26B-A4B": {
        "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "attention_bias": False, "enable_moe_block": True,
        "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
    },
}  # fmt: skip
SHAPES["everything"] = SHAPES["E2B"] | {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
}  # fmt: skip
"""Nobody has published it: experts in layers with inputs of their own and shared keys and values."""
POLICIES = list(ActivationPolicy)


def gemma4(shape: str) -> Any:
    """A small random model of a published shape, with adapters on every linear layer."""
    family = family_of_type("gemma4_text")
    assert family is not None
    model = family_model(family, **SHAPES[shape])
    assert why_not_fused(model.get_base_model()) is None
    return model


@cache
def expected(shape: str) -> dict[str, torch.Tensor]:
    """The results of transformers, of documents one by one."""
    found = documents_pass(gemma4(shape), DOCUMENTS, packed=False)
    assert all(value.abs().max() > 0 for value in found.values())
    return found


def fused(model: Any, *policies: ActivationPolicy) -> FusedLayers:
    """The model's layers, fused, with these policies in turn."""
    causal = model.get_base_model()
    count = causal.config.num_hidden_layers
    return FusedLayers(causal, (policies * count)[:count], torch.float32, keep_dequantized=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_layers_compute_what_transformers_computes(shape: str) -> None:
    model = gemma4(shape)
    rows = rows_pass(model, 2, 5)
    layers = fused(model, ActivationPolicy.SAVE_ALL)
    assert largest_error(rows_pass(model, 2, 5), rows) < TOLERANCE

    for policies in (*[[policy] for policy in POLICIES], POLICIES):
        layers.set_policies((policies * len(layers.layers))[: len(layers.layers)])
        assert largest_error(documents_pass(model, DOCUMENTS, packed=True), expected(shape)) < TOLERANCE, policies


@pytest.mark.parametrize("policy", [ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.OFFLOAD])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_change_nothing(shape: str, policy: ActivationPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", 4)
    model = gemma4(shape)
    assert fused(model, policy).layers[0].is_tiled(sum(DOCUMENTS))
    assert largest_error(documents_pass(model, DOCUMENTS, packed=True), expected(shape)) < TOLERANCE


def test_a_lost_gradient_of_shared_keys_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = decoder_layer.DecoderLayerFunction.backward
    monkeypatch.setattr(
        decoder_layer.DecoderLayerFunction, "backward", staticmethod(lambda ctx, dy, *_: backward(ctx, dy))
    )
    model = gemma4("E2B")
    fused(model, ActivationPolicy.SAVE_ALL)
    found, whole = documents_pass(model, DOCUMENTS, packed=True), expected("E2B")

    lost = {name for name in whole if largest_error({name: found[name]}, {name: whole[name]}) > TOLERANCE}
    keys = {name for name in whole if ".k_proj" in name}
    assert keys
    assert keys <= lost
    assert "logits" not in lost


def router_of_the_mlp(block: MlpBesideExperts, layer: Any) -> None:
    """The router reads what the MLP makes of the stream, not the stream."""
    router = block.router
    block.router = lambda rows: router(layer.mlp(layer.pre_feedforward_layernorm(rows)))


def one_norm_before_both(block: MlpBesideExperts, layer: Any) -> None:
    assert block.mlp.norm is not None
    block.expert_norm = block.mlp.norm


def norms_behind_exchanged(block: MlpBesideExperts, layer: Any) -> None:
    assert block.mlp.post_norm is not None
    block.mlp.post_norm, block.expert_post_norm = block.expert_post_norm, block.mlp.post_norm


def no_norm_of_the_sum(block: MlpBesideExperts, layer: Any) -> None:
    block.post_norm = block.post_norm._replace(eps=1e6, weight=1e3 * block.post_norm.weight)


@pytest.mark.parametrize(
    "mistake", [router_of_the_mlp, one_norm_before_both, norms_behind_exchanged, no_norm_of_the_sum]
)
def test_a_wrong_input_of_experts_or_router_is_noticed(mistake: Any) -> None:
    model = gemma4("26B-A4B")
    layers = fused(model, ActivationPolicy.SAVE_ALL)
    for layer, module in zip(layers.layers, model.get_base_model().model.layers, strict=True):
        assert isinstance(layer.mlp, MlpBesideExperts)
        mistake(layer.mlp, module)
    found = documents_pass(model, DOCUMENTS, packed=True)["logits"]
    assert largest_error({"logits": found}, {"logits": expected("26B-A4B")["logits"]}) > 0.01


def test_a_lost_gradient_of_the_router_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_beside_experts, "choose_backward", lambda router, rows, _: torch.zeros_like(rows))
    model = gemma4("26B-A4B")
    fused(model, ActivationPolicy.SAVE_ALL)
    found, whole = documents_pass(model, DOCUMENTS, packed=True), expected("26B-A4B")
    assert largest_error({"logits": found["logits"]}, {"logits": whole["logits"]}) < TOLERANCE
    assert largest_error(found, whole) > 20 * TOLERANCE


def test_rows_that_say_less_of_the_experts_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    family, causal = family_of_type("gemma4_text"), gemma4("26B-A4B").get_base_model()
    assert family is not None
    mixture = family.mixture
    assert mixture is not None
    with pytest.raises(ValueError, match="gemma4_text: the output of experts has no norm"):
        replace(family, mixture=replace(mixture, branch_norms=None))

    for wrong, reason in {
        None: "4 experts a layer",
        replace(mixture, shared=None): "mlp.gate_proj.base_layer is a module that other Gemma4 models do not have",
        replace(mixture, router="mlp"): "router is a module that other Gemma4 models do not have",
    }.items():
        monkeypatch.setattr(families, "FAMILIES", (replace(family, mixture=wrong),))
        assert why_not_fused(causal) == reason


def dropping_mixture() -> Any:
    """The mixture whose adapters beside the experts' drop a part of their inputs."""
    model = gemma4("26B-A4B").train()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.3)
    return model


def test_dropout_of_the_mlp_beside_experts_has_the_same_masks_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    one = (sum(DOCUMENTS),)
    model, plain = dropping_mixture(), dropping_mixture()
    torch.manual_seed(7)
    drop_by(plain.get_base_model(), [new_dropout_seed(), new_dropout_seed()])
    whole, layers = documents_pass(plain, one, packed=False), fused(model, ActivationPolicy.SAVE_ALL)
    for policy in POLICIES:
        layers.set_policies([policy] * 2)
        torch.manual_seed(7)
        assert largest_error(documents_pass(model, one, packed=True), whole) < TOLERANCE, policy
    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", 4)
    torch.manual_seed(7)
    assert largest_error(documents_pass(model, one, packed=True), whole) < TOLERANCE
    torch.manual_seed(8)
    assert largest_error(documents_pass(model, one, packed=True), whole) > 0.1, "the control: other masks"


def large_mixture(dtype: torch.dtype) -> Any:
    """The mixture with a residual stream that grows to 100,000; frozen weights are numbers that fp16 can say."""
    model = gemma4("26B-A4B")
    for layer in model.get_base_model().model.layers:
        layer.post_feedforward_layernorm.weight.data.fill_(40_000.0)
    experts = (weight for _, module in stacked_experts(model) for weight in module.buffers())
    for weight in (*(each for each in model.parameters() if not each.requires_grad), *experts):
        weight.data = weight.data.half().to(dtype)
    keep_routers_in_fp32(model.get_base_model())
    return model


def test_experts_and_router_read_a_stream_beyond_fp16() -> None:
    """On cards without bfloat16: norms bring it back before the experts, and the router computes in fp32."""
    expected = documents_pass(large_mixture(torch.float32), DOCUMENTS, packed=False)["logits"]
    model = large_mixture(torch.float16)
    layers = FusedLayers(model.get_base_model(), [POLICIES[0]] * 2, torch.float16, keep_dequantized=True)
    assert layers.is_wide

    def error(policy: ActivationPolicy) -> float:
        layers.set_policies([policy] * 2)
        with torch.autocast("cpu", torch.float16):
            found = documents_pass(model, DOCUMENTS, packed=True)
        assert all(value.isfinite().all() for value in found.values()) == layers.is_wide
        return float((found["logits"].float() - expected).norm() / expected.norm())

    errors = [error(policy) for policy in POLICIES]
    print("fp16:", [f"{value:.1e}" for value in errors])
    assert max(errors) < 5e-3
    layers.is_wide = False
    assert not error(POLICIES[0]) < 1, "the control: fp16 cannot hold it"


def test_documents_are_kept_apart_where_keys_cross_layers() -> None:
    model = gemma4("E2B")
    fused(model, ActivationPolicy.SAVE_ALL)
    as_one = documents_pass(model, (sum(DOCUMENTS),), packed=True)
    assert largest_error({"logits": as_one["logits"]}, {"logits": expected("E2B")["logits"]}) > 0.01


def test_layers_that_reuse_keys_take_all_tokens() -> None:
    model = gemma4("E2B")
    fused(model, ActivationPolicy.SAVE_ALL)
    with pytest.raises(ValueError, match="layer 2 gets 1 of 8 tokens"), torch.no_grad():
        model.get_base_model()(input_ids=torch.arange(1, 9)[None], use_cache=False, logits_to_keep=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_save_what_the_memory_plan_counts(shape: str) -> None:
    model = gemma4(shape).get_base_model().requires_grad_(False).to(torch.bfloat16)
    keep_routers_in_fp32(model)
    layers = FusedLayers(
        model, [ActivationPolicy.SAVE_ALL] * len(model.model.layers), torch.bfloat16, keep_dequantized=False
    )
    planned = build_shape(model.config, ParameterCounts(1, 1, quantized=False, movable_bytes=0))
    ids = torch.arange(1, 41)[None]
    rows = model.get_input_embeddings()(ids).requires_grad_()
    own = {}
    if planned.layer_input:
        own["per_layer_inputs"] = model.model.get_per_layer_inputs(ids, rows)

    def saved(policy: ActivationPolicy) -> int:
        layers.set_policies([policy] * len(layers.layers))
        return bytes_saved(lambda: model(inputs_embeds=rows, **own, use_cache=False))

    least = saved(ActivationPolicy.RECOMPUTE_ALL)
    for policy in (ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.SAVE_ALL):
        policies = [policy] * len(layers.layers), [ActivationPolicy.RECOMPUTE_ALL] * len(layers.layers)
        more, all_less = map(planned.saved_by, policies)
        # Adapters save a few numbers of each row, which are not counted.
        print(f"{shape} {policy.value}: {saved(policy) - least} bytes saved, {ids.numel() * (more - all_less)} planned")
        assert saved(policy) - least == pytest.approx(ids.numel() * (more - all_less), rel=0.03)
