"""Models of a few small layers with adapters: every family's structure in tensors of a few hundred elements."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_kernels.layers.mlp_builder import PROJECTIONS
from finetune_kernels.primitives import adapter_dropout
from finetune_kernels.primitives.adapter_dropout import DropoutSeed, Mask
from finetune_test_kernels.tensor_checks import DEVICE, normal

CENTERED = ("gemma", "gemma2", "gemma3_text", "vaultgemma", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
"""Types that add one to their norms' weights."""
LINEARS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
    "per_layer_input_gate", "per_layer_projection",
]  # fmt: skip


def small_model(kind: str, dtype: torch.dtype, *, layers: int = 1, vocabulary: int = 24, **adapter: Any) -> Any:
    """A peft model over a random base of transformers' type `kind`; `adapter` are LoraConfig's options. Norms are
    jittered around what is usual, everything else is drawn wide enough that every term counts."""
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": vocabulary, "pad_token_id": 0, "max_position_embeddings": 64,
    }  # fmt: skip
    if kind != "phi3":
        sizes["head_dim"] = 16  # Phi-3 has no other than hidden_size / heads, which is the same
    if kind == "gemma4_text":
        sizes |= {"global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": vocabulary}
        sizes["layer_types"] = ["sliding_attention"] * (layers - 1) + ["full_attention"]

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes), dtype=torch.float32)  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": LINEARS} | adapter
    model: Any = get_peft_model(base, LoraConfig(**options))

    usual = 0.0 if kind in CENTERED else 1.0
    for name, parameter in model.to(dtype).named_parameters():
        torch.nn.init.normal_(parameter, mean=usual if "norm" in name else 0.0, std=0.25)
    return model


def one_pass(model: Any, length: int) -> dict[str, torch.Tensor]:
    """Logits and gradients of one pass through a peft model, for one document of `length` tokens."""
    tokens = torch.arange(3, 3 + length, device=DEVICE).unsqueeze(0)
    inputs = {name: value for name, value in model.named_parameters() if value.requires_grad}
    logits = model.get_base_model()(input_ids=tokens, position_ids=tokens - 3, use_cache=False).logits
    found = torch.autograd.grad(logits, list(inputs.values()), normal(*logits.shape))
    return dict(zip(inputs, found, strict=True)) | {"logits": logits.detach()}


def cos_sin_of(causal: Any, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of a transformers model's first layer, in the type of `x`; Gemma 3 has two kinds of layers."""
    rotary = causal.model.rotary_emb
    kinds: tuple[Any, ...] = ()
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds = (causal.config.layer_types[0],)
    cos, sin = rotary(x, positions, *kinds)
    return cos.to(x.dtype), sin.to(x.dtype)


class OurDropout(torch.nn.Module):
    """Dropout in place of peft's, by a mask of ours."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self._mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, N] or [T, N]."""
        return adapter_dropout.reference(x.flatten(0, -2), self._mask).view(x.shape)


def drop_by(causal: Any, seeds: Sequence[DropoutSeed]) -> None:
    """Replaces the dropout of peft's own layers by our masks, with a seed for each decoder layer."""
    for layer, seed in zip(causal.model.layers, seeds, strict=True):
        for name, module in layer.named_modules():
            if hasattr(module, "lora_dropout"):
                philox_stream, p = PROJECTIONS.index(name.split(".")[-1]), module.lora_dropout["default"].p
                module.lora_dropout["default"] = OurDropout(Mask(seed, philox_stream, p))
