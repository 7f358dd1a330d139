"""Weights of layers that differ, in NF4: what is kept, streamed and whole at a time is what the memory plan counts."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.loaded_weights import kept_parameters, let_stream
from finetune_kernels.planning.model_shape import ModelShape, ParameterCounts, build_shape
from finetune_kernels.planning.streamed_weights import streamed_bytes, window_bytes
from finetune_test_kernels.family_settings import family_config
from finetune_test_kernels.quantized_layers import linears_of, quantize_linears, stream
from finetune_test_kernels.small_layers import one_pass
from finetune_test_kernels.tensor_checks import DEVICE

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="in fp32, by the kernels' formulas"),
    pytest.mark.usefixtures("in_pytorch"),
]
ORDER = ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"]
WHOLE_BLOCKS: dict[str, Any] = {"layers_block_type": ORDER, "head_dim": 16, "intermediate_size": 256}
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "in_proj"]
SHARE = 0.01


def quantized() -> Any:
    """A peft model over a small random Nemotron H whose linear layers are in double-quantised NF4."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["nemotron_h"](**family_config("nemotron_h", **WHOLE_BLOCKS))
    base: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    quantize_linears(base.model.layers)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def planned(model: Any) -> ModelShape:
    """The model's shape, whose layers can stream."""
    causal = model.get_base_model()
    states = [linear.weight.quant_state.shape for linear in linears_of(causal.model.layers)]
    counts = ParameterCounts(sum(rows * columns for rows, columns in states), 1, quantized=True, movable_bytes=0)
    return let_stream(build_shape(causal.config, counts), double_quantized=True)


def test_what_is_kept_dequantised_is_what_is_planned() -> None:
    model = quantized()
    shape, count = planned(model), len(ORDER)
    layers = FusedLayers(
        model.get_base_model(), [ActivationPolicy.RECOMPUTE_MLP] * count, torch.float32, keep_dequantized=False
    )
    found = []
    for kept in range(count + 1):
        layers.keep_weights(kept)
        found.append(layers.dequantized_bytes)
    assert found == [4 * kept for kept in kept_parameters(shape)]
    assert found[1] > 2 * (found[3] - found[1]), "an MLP is larger than attention"
    assert found[5] - found[4] == 0, "nothing of Mamba is kept"


@pytest.mark.parametrize("policy", [ActivationPolicy.OFFLOAD, ActivationPolicy.SAVE_ALL])
def test_layers_stream_in_the_places_that_are_planned(policy: ActivationPolicy) -> None:
    resident, streamed = quantized(), quantized()
    shape, count = planned(resident), len(ORDER)
    hosts = [stream(quantized(), some) for some in range(1, count)] + [stream(streamed, count)]

    # As shares of all layers: tables of NF4 and padding, which are not planned, count in a layer of a few kilobytes.
    found, whole = [host.host_bytes / hosts[-1].host_bytes for host in hosts], streamed_bytes(shape, count)
    assert found == pytest.approx([streamed_bytes(shape, some) / whole for some in range(1, 1 + count)], abs=SHARE)
    assert max(abs(share - some / count) for some, share in enumerate(found, 1)) > 2 * SHARE, "layers differ"
    assert hosts[-1].slot_bytes / hosts[-1].host_bytes == pytest.approx(window_bytes(shape) / whole, abs=2 * SHARE)

    for model in (resident, streamed):
        FusedLayers(model.get_base_model(), [policy] * count, torch.float32, keep_dequantized=False)
    expected = one_pass(resident, 9)
    for _ in range(2):
        found = one_pass(streamed, 9)
        assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
