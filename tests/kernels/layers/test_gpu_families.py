"""Every family's small model on a GPU in bfloat16: packed documents through fused layers, beside transformers' own
layers in bfloat16, both against transformers in fp32."""

from typing import Any

import pytest
import torch

from finetune_kernels.experts.replacing import stacked_experts
from finetune_kernels.experts.routers import keep_routers_in_fp32
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.layer_check import why_not_fused
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.family import Family
from finetune_test_kernels.family_settings import FUSED_FAMILIES, documents_pass, family_config, family_model
from finetune_test_kernels.tensor_checks import root_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # a GPU's image has other versions than the lock, which warn of other things
]
DOCUMENTS = (70, 20, 50)
SIZES = {"max_position_embeddings": 256}
RATIO = 1.3
"""Share of eager bfloat16's error, mean of all tensors: as in test_gpu_layers.py for the worst tensor."""
DRAWS = {"falcon_h1": 6, "nemotron_h": 6}
"""Models that are drawn, if not one: state spaces amplify rounding, so that one draw of Falcon H1 says 0.76 to 1.72 of
eager bfloat16's error (by formulas on a CPU), and six together 0.99. Of Nemotron H's first draw, eager bfloat16 has
0.26 for the first A on a CPU and 0.10 on an H200, and fused layers 0.28 on both."""
GEMMA4_26B: dict[str, Any] = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 4, "moe_intermediate_size": 16,
    "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "attention_bias": False,
}  # fmt: skip
"""Experts beside the MLP."""
MODELS = {family.prefix: (family, dict[str, Any]()) for family in FUSED_FAMILIES}
MODELS["Gemma4 26B-A4B"] = (MODELS["Gemma4"][0], GEMMA4_26B)
Errors = dict[ActivationPolicy, dict[str, tuple[float, float]]]
"""Our and eager bfloat16's error of each tensor, relative to fp32."""


def every_expert(model_type: str) -> dict[str, Any]:
    """Settings by which every token goes to all experts of a family: a choice between two that differ by rounding alone
    would be another model."""
    config = family_config(model_type)
    names = [name for name in ("num_experts_per_tok", "moe_topk", "moe_k") if name in config]
    return dict.fromkeys(names, 4) | ({"topk_group": config["n_group"]} if "n_group" in config else {})


def rounded(family: Family, seed: int, changes: dict[str, Any]) -> Any:
    """A model whose weights bfloat16 can say."""
    model = family_model(family, seed, **SIZES, **every_expert(family.model_type) | changes)
    experts = (weight for _, module in stacked_experts(model) for weight in module.buffers())
    for weight in (*model.parameters(), *experts):
        weight.data = weight.data.bfloat16().float()
    model.get_base_model().set_attn_implementation("eager")  # transformers 5.17's own choice leaves softcaps out
    return model


@pytest.mark.parametrize("name", MODELS)
def test_errors_are_no_larger_than_those_of_eager_bf16(name: str) -> None:
    family, changes = MODELS[name]
    drawn = [errors_of(family, seed, changes) for seed in range(DRAWS.get(family.model_type, 1))]
    for policy in ActivationPolicy:
        pairs = [(tensor, *errors) for one in drawn for tensor, errors in one[policy].items()]
        ours, eager = (sum(pair[place] for pair in pairs) for place in (1, 2))
        print(f"{name} {policy.value}: {ours / eager:.3f} of eager bf16's error; the tensors that differ most")
        for tensor, our, their in sorted(pairs, key=lambda pair: pair[2] - pair[1])[:5]:
            print(f"  {tensor}: {our:.4f}, eager {their:.4f}")
        assert ours <= RATIO * eager


def errors_of(family: Family, seed: int, changes: dict[str, Any]) -> Errors:
    """Errors of a model's packed documents in each policy, and of transformers' own layers in bfloat16."""
    oracle = documents_pass(rounded(family, seed, changes), DOCUMENTS, packed=False)
    model = rounded(family, seed, changes).to(torch.bfloat16)
    keep_routers_in_fp32(model.get_base_model())
    eager = documents_pass(model, DOCUMENTS, packed=False)

    causal, found = model.get_base_model(), Errors()
    assert why_not_fused(causal) is None
    count = len(causal.model.layers)
    fused = FusedLayers(causal, [ActivationPolicy.SAVE_ALL] * count, torch.bfloat16, keep_dequantized=True)
    for policy in ActivationPolicy:
        fused.set_policies([policy] * count)
        ours = documents_pass(model, DOCUMENTS, packed=True)
        found[policy] = {
            name: (root_error(ours[name], expected), root_error(eager[name], expected))
            for name, expected in oracle.items()
        }
    return found
