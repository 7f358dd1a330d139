"""The gradients of a whole layer against numerical differentiation, in fp64; those of its parts: test_gradients.py."""

from typing import Any

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck

from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.ops import rms_norm
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_test_kernels.small_layers import cos_sin_of, small_model
from finetune_test_kernels.tensor_checks import normal

STRICT = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-6}  # central differences in fp64 are good to about 1e-9 here


LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, some adapters": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "Llama, one adapter": ("llama", {"target_modules": ["up_proj"]}),
    "Llama, dropout": ("llama", {"lora_dropout": 0.4}),
    "Llama, DoRA": ("llama", {"use_dora": True}),
    "Qwen2, rsLoRA": ("qwen2", {"use_rslora": True}),
    "Qwen3": ("qwen3", {}),
    "Phi3": ("phi3", {}),
    "Gemma2": ("gemma2", {}),
    "Gemma2, DoRA": ("gemma2", {"use_dora": True, "target_modules": ["k_proj", "o_proj", "gate_proj"]}),
    "Gemma2, dropout": ("gemma2", {"lora_dropout": 0.4}),
    "Gemma3": ("gemma3_text", {}),
}


@pytest.mark.usefixtures("in_pytorch", "constant_norms")
@pytest.mark.parametrize(
    "policy", [ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.RECOMPUTE_ALL]
)
@pytest.mark.parametrize("name", LAYERS)
def test_a_whole_layer(name: str, policy: ActivationPolicy) -> None:
    """The layer's own function, its kernels replaced by their formulas."""
    kind, options = LAYERS[name]
    causal = small_model(kind, torch.float64, **options).get_base_model()
    FusedLayers(causal, [policy], torch.float64, keep_dequantized=True)
    layer = causal.model.layers[0]
    x, positions = (
        normal(1, 7, causal.config.hidden_size, dtype=torch.float64, device="cpu"),
        torch.tensor([[0, 1, 2, 0, 0, 1, 2]]),
    )
    cos_sin = cos_sin_of(causal, x, positions)
    ends = torch.tensor([0, 3, 4, 7], dtype=torch.int32)

    def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)  # the same masks at every call
        result: torch.Tensor = layer(x, position_embeddings=cos_sin, cu_seq_lens_q=ends, max_length_q=3)
        return result

    inputs = [x.requires_grad_(), *(value for value in layer.parameters() if value.requires_grad)]
    assert len(inputs) > 2
    assert gradcheck(run, inputs, fast_mode=True, **STRICT)


@pytest.mark.usefixtures("in_pytorch")
def test_a_layer_with_a_wrong_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rms_norm.backward

    def wrong(*arguments: Any, residual: torch.Tensor, **options: Any) -> Any:
        return right(*arguments, residual=0.999 * residual, **options)

    monkeypatch.setattr(rms_norm, "backward", wrong)
    with pytest.raises(GradcheckError):
        test_a_whole_layer("Llama", ActivationPolicy.SAVE_ALL)
