"""Every row of the kernels' families is complete and true: its classes exist in transformers, a small model of it can
be fused, and fused layers compute what transformers computes. A row that is wrong is refused, not built."""

import sys
from dataclasses import replace

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.layer_builder import why_not_fused
from finetune_kernels.planning import families
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import ACTIVATIONS, FAMILIES, Family
from finetune_test_kernels.small_layers import one_pass, small_model
from finetune_test_kernels.tensor_checks import DEVICE, largest_error

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU in bfloat16: test_gpu_layers.py")
TOLERANCE = 2e-4  # fp32, as in test_fused_layers.py
LLAMA, QWEN3, GEMMA2 = (next(row for row in FAMILIES if row.prefix == name) for name in ("Llama", "Qwen3", "Gemma2"))
MISTRAL = next(row for row in FAMILIES if row.prefix == "Mistral")


def gaps(family: Family) -> list[str]:
    """Lists what the row lacks or says wrongly; empty for a good one."""
    if family.model_type not in CONFIG_MAPPING:
        return [f"transformers has no {family.model_type}"]
    model = small_model(family.model_type, torch.float32)
    causal = model.get_base_model()
    attention = causal.model.layers[0].self_attn

    names = vars(sys.modules[type(causal).__module__])
    classes = (family.architecture, family.norm, family.mlp, family.attention)
    found = [f"transformers has no {name}" for name in classes if name not in names]
    if getattr(causal.config, family.activation_field, None) not in ACTIVATIONS:
        found.append(f"no known activation in {family.activation_field}")
    if family.scales_embedding != (type(causal.get_input_embeddings()) is not torch.nn.Embedding):
        found.append("scales_embedding")
    by_layer, by_model = hasattr(attention, "sliding_window"), hasattr(causal.config, "sliding_window")
    if family.window != ("layer" if by_layer else "model" if by_model else "none"):
        found.append("window")
    if found:
        return found
    return [reason] if (reason := why_not_fused(causal)) else differences(model)


def differences(model: torch.nn.Module) -> list[str]:
    """Says by how much fused layers differ from transformers' own; empty if by no more than rounding."""
    expected = one_pass(model, 7)
    FusedLayers(model.get_base_model(), [ActivationPolicy.SAVE_ALL], torch.float32, keep_dequantized=True)  # type: ignore[operator]
    error = largest_error(one_pass(model, 7), expected)
    return [] if error < TOLERANCE else [f"computes something else: error {error:.0e}"]


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.prefix)
def test_a_row_lacks_nothing(family: Family) -> None:
    assert gaps(family) == []


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize(
    ("family", "gap"),
    [
        (replace(LLAMA, model_type="llama9"), "transformers has no llama9"),
        (Family("Cohere", "cohere"), "transformers has no CohereRMSNorm"),
        (Family("Olmo2", "olmo2"), "Olmo2DecoderLayer has no input_layernorm"),
        (replace(LLAMA, head_norms=True), "LlamaDecoderLayer has no self_attn.q_norm"),
        (replace(LLAMA, merged_projections=True), "LlamaDecoderLayer has no self_attn.qkv_proj"),
        (replace(QWEN3, head_norms=False), "self_attn.q_norm is a norm that other Qwen3 models do not have"),
        (replace(GEMMA2, second_norms=False), "pre_feedforward_layernorm is a norm that other Gemma2"),
        (replace(GEMMA2, activation_field="hidden_act"), "no known activation in hidden_act"),
        (replace(GEMMA2, scales_embedding=False), "scales_embedding"),
        (replace(MISTRAL, window="none"), "window"),
        (Family("Granite", "granite"), "embedding_multiplier = 1.0 in the configuration, a factor that"),
        (replace(GEMMA2, norm_offset=0.0), "computes something else"),
        (replace(GEMMA2, caps_scores=False), "computes something else"),
    ],
    ids=str,
)
def test_a_wrong_row_is_noticed(family: Family, gap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (family,))
    assert any(gap in found for found in gaps(family))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("input_layernorm", "input_layernorm is Renamed, not LlamaRMSNorm"),
        ("mlp", "mlp is Renamed, not LlamaMLP"),
        ("self_attn", "self_attn is Renamed, not LlamaAttention"),
    ],
)
def test_a_layer_that_passes_the_check_can_be_built(module: str, reason: str) -> None:
    """A norm class under another name once passed `why_not_fused` and was a KeyError in the builder."""
    causal = small_model("llama", torch.float32).get_base_model()
    assert why_not_fused(causal) is None
    part = getattr(causal.model.layers[0], module)
    part.__class__ = type("Renamed", (type(part),), {})
    assert why_not_fused(causal) == reason
