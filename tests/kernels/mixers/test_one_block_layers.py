"""Layers of one block (Nemotron H): attention, Mamba, an MLP or experts. Fused, they compute what transformers does, in
any order, under every policy and in tiles; they save what the memory plan counts."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from finetune_kernels.experts.replacing import stacked_experts
from finetune_kernels.graphs.layer_graphs import LayerGraphs
from finetune_kernels.layers import one_block_layer
from finetune_kernels.layers.blocks import tiled_mlp
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.layer_check import why_not_fused
from finetune_kernels.layers.one_block_layer import OneBlockLayer
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import family_of_type
from finetune_kernels.planning.family import AFTER_BOTH, Family
from finetune_kernels.planning.model_shape import ParameterCounts, build_shape
from finetune_test_kernels.family_settings import documents_pass, family_model
from finetune_test_kernels.rerun_recorder import Clock, RerunRecorder, Waiting
from finetune_test_kernels.tensor_checks import DEVICE, bytes_saved, largest_error

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU in bfloat16: test_gpu_families.py"),
    pytest.mark.usefixtures("in_pytorch"),
]
TOLERANCE = 2e-4  # fp32, as in test_families.py
DOCUMENTS = (7, 2, 5)
MAMBA, ATTENTION, MLP, EXPERTS = "linear_attention", "full_attention", "mlp", "moe"
ORDERS = {
    "published": (MAMBA, MLP, MAMBA, ATTENTION, MLP),
    "MLP first": (MLP, ATTENTION, MAMBA, MLP),
    "with experts": (EXPERTS, MAMBA, EXPERTS, ATTENTION, MLP),
}
POLICIES = list(ActivationPolicy)
LESS = POLICIES[1:]
"""Policies under which a long MLP runs in tiles."""
Results = dict[str, torch.Tensor]


def nemotron(order: tuple[str, ...] = ORDERS["published"], **changes: Any) -> Any:
    """A small random model with layers of these types, and adapters on every linear layer."""
    family = family_of_type("nemotron_h")
    assert family is not None
    model = family_model(family, layers_block_type=list(order), **changes)
    assert why_not_fused(model.get_base_model()) is None
    return model


def fused(model: Any, *policies: ActivationPolicy, dtype: torch.dtype = torch.float32) -> FusedLayers:
    """The model's layers, fused, with these policies in turn."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    count = len(causal.model.layers)
    return FusedLayers(causal, (policies * count)[:count], dtype, keep_dequantized=True)


@cache
def expected(order: str) -> Results:
    """The results of transformers, of documents one by one."""
    found = documents_pass(nemotron(ORDERS[order]), DOCUMENTS, packed=False)
    assert all(value.abs().max() > 0 for value in found.values())
    return found


def error(model: Any, order: str = "published") -> float:
    """The largest difference of packed documents from transformers' documents one by one."""
    return largest_error(documents_pass(model, DOCUMENTS, packed=True), expected(order))


@pytest.mark.parametrize("order", ORDERS)
def test_fused_layers_compute_what_transformers_computes(order: str) -> None:
    model = nemotron(ORDERS[order])
    layers = fused(model, ActivationPolicy.SAVE_ALL)
    assert all(isinstance(layer, OneBlockLayer) for layer in layers.layers)
    for policies in (*[[policy] for policy in POLICIES], POLICIES, POLICIES[::-1]):
        layers.set_policies((policies * len(layers.layers))[: len(layers.layers)])
        assert error(model, order) < TOLERANCE, policies


@pytest.mark.parametrize("order", ["published", "with experts"])
@pytest.mark.parametrize("policy", LESS)
def test_tiles_change_nothing(policy: ActivationPolicy, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", 4)
    model, kinds = nemotron(ORDERS[order]), ORDERS[order]
    layers = fused(model, policy)
    assert [layer.is_tiled(sum(DOCUMENTS)) for layer in layers.layers] == [kind in (MLP, EXPERTS) for kind in kinds]
    assert error(model, order) < TOLERANCE


def test_a_lost_residual_stream_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_block_layer, "add_residual", lambda out, rows: out)
    model = nemotron()
    fused(model, ActivationPolicy.SAVE_ALL)
    assert error(model) > 100 * TOLERANCE


def test_documents_that_are_one_are_noticed() -> None:
    model = nemotron((ATTENTION, MLP))
    apart = documents_pass(model, DOCUMENTS, packed=False)
    fused(model, ActivationPolicy.SAVE_ALL)
    assert largest_error(documents_pass(model, DOCUMENTS, packed=True), apart) < TOLERANCE
    assert largest_error(documents_pass(model, (sum(DOCUMENTS),), packed=True), apart) > 100 * TOLERANCE


def with_dropout() -> tuple[Any, FusedLayers]:
    """A model whose adapters drop half of their inputs, and its layers."""
    model = nemotron()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.5)
    return model.train(), fused(model, ActivationPolicy.SAVE_ALL)


def drawn(model: Any, seed: int = 1) -> Results:
    """Results with the masks that follow from a seed."""
    torch.manual_seed(seed)
    return documents_pass(model, DOCUMENTS, packed=True)


def test_backward_drops_what_forward_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = with_dropout()
    wanted = drawn(model)
    assert largest_error(drawn(model, seed=2), wanted) > 100 * TOLERANCE, "masks count"
    for policy in LESS:
        layers.set_policies([policy] * len(layers.layers))
        assert largest_error(drawn(model), wanted) < TOLERANCE, policy
    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", 4)
    assert largest_error(drawn(model), wanted) < TOLERANCE, "in tiles"


@pytest.mark.parametrize("kind", [MLP, ATTENTION])
def test_masks_that_are_drawn_anew_in_backward_are_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = with_dropout()
    wanted = drawn(model)
    layers.set_policies([ActivationPolicy.RECOMPUTE_ALL] * len(layers.layers))
    backward = one_block_layer.OneBlockFunction.backward

    def with_another_pass(ctx: Any, dy: torch.Tensor) -> Any:
        if ORDERS["published"][ctx.layer.index] == kind:
            ctx.pass_ctx = ctx.layer.begin()
        return backward(ctx, dy)

    monkeypatch.setattr(one_block_layer.OneBlockFunction, "backward", staticmethod(with_another_pass))
    assert largest_error(drawn(model), wanted) > 100 * TOLERANCE


@pytest.mark.parametrize(("kind", "adapters"), [(MAMBA, (0, 0)), (ATTENTION, (4, 4)), (MLP, (1, 2)), (EXPERTS, (1, 2))])
def test_layers_save_what_the_memory_plan_counts(kind: str, adapters: tuple[int, int]) -> None:
    """`adapters`: those of which a layer saves two numbers a token, which are not planned, under each policy."""
    count, tokens = 3, 40
    model = nemotron((kind,) * count).get_base_model().requires_grad_(False).to(torch.bfloat16)
    layers = fused(model, ActivationPolicy.SAVE_ALL, dtype=torch.bfloat16)
    planned = build_shape(model.config, ParameterCounts(1, 1, quantized=False, movable_bytes=0))
    rows = model.get_input_embeddings()(torch.arange(1, 1 + tokens)[None]).requires_grad_()

    def saved(policy: ActivationPolicy) -> int:
        layers.set_policies([policy] * count)
        return bytes_saved(lambda: model.model(inputs_embeds=rows, use_cache=False))

    least, found = saved(ActivationPolicy.RECOMPUTE_ALL), list[int]()
    for policy, each in zip((ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.SAVE_ALL), adapters, strict=True):
        more, less = (planned.saved_by([chosen] * count) for chosen in (policy, ActivationPolicy.RECOMPUTE_ALL))
        found.append(saved(policy) - least)
        # Where the rows of each expert end is a number an expert, and none a token.
        ends = 4 * 4 * count if kind == EXPERTS and policy is ActivationPolicy.SAVE_ALL else 0
        assert found[-1] == tokens * (more - less + count * each * 2 * 2) + ends, policy
    assert (found[1] > found[0]) == (kind in (MLP, EXPERTS)), "only these have more to save"


def test_attention_and_mlps_are_recorded_and_compute_the_same_bits() -> None:
    order = ORDERS["published"]
    found = []
    for records in (False, True):
        model, recorder = nemotron(), RerunRecorder()
        layers = fused(model, ActivationPolicy.RECOMPUTE_MLP)
        assert [layer.is_recordable for layer in layers.layers] == [kind != MAMBA for kind in order]
        if records:
            graphs = LayerGraphs(lambda recorder=recorder: recorder, lambda: True, Waiting(), Clock())  # type: ignore[misc]
            layers.use_graphs(graphs)
        found.append([documents_pass(model, DOCUMENTS, packed=True) for _ in range(6)])
    assert recorder.launches > 0
    for eager, launched in zip(*found, strict=True):
        assert [name for name, value in eager.items() if not torch.equal(value, launched[name])] == []


def test_padding_before_tokens_is_refused_though_the_first_layer_gets_no_mask() -> None:
    model = nemotron(ORDERS["MLP first"])
    fused(model, ActivationPolicy.SAVE_ALL)
    tokens, mask = torch.arange(1, 9)[None], torch.ones(1, 8, dtype=torch.long)
    model(input_ids=tokens, attention_mask=mask, use_cache=False)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="this mask hides a token before one"):
        model(input_ids=tokens, attention_mask=mask, use_cache=False)


def test_with_a_cache_transformers_own_layers_answer() -> None:
    model = nemotron().eval()
    tokens = torch.arange(1, 9)[None]
    wanted = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
    fused(model, ActivationPolicy.SAVE_ALL)
    assert torch.equal(model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False), wanted)


def test_a_projection_around_the_experts_is_left_to_transformers_layers() -> None:
    family = family_of_type("nemotron_h")
    assert family is not None
    model = family_model(family, moe_latent_size=16)
    causal, (_, experts) = model.get_base_model(), stacked_experts(model)[0]
    assert why_not_fused(causal) == "moe_latent_size = 16 in the configuration: a projection around the experts"
    planned = build_shape(causal.config, ParameterCounts(1, 1, quantized=False, movable_bytes=0)).experts
    assert planned is not None
    assert planned.parameters == experts.parameters_count
    found = documents_pass(model, DOCUMENTS, packed=False)
    assert all(found[name].abs().max() > 0 for name in found if ".experts.adapters." in name)


def test_a_row_with_a_norm_behind_its_one_block_is_none() -> None:
    with pytest.raises(ValueError, match="the output of a layer's one block has no norm"):
        Family("Strange", "strange", block="any", post_norms=AFTER_BOTH)
