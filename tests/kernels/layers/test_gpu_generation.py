"""Generation on a GPU in bfloat16: a left-padded batch with a cache through our attention and modules, against fp32."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import AttentionMaskInterface

from finetune_kernels.layers import packed_attention
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.patching import patch_model
from finetune_kernels.planning.activation_policy import ActivationPolicy

pytestmark = pytest.mark.gpu
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = (9, 64, 33)
RATIO = 1.5  # of eager bf16's own error, which is a mean over few logits here


def make(dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        head_dim=128, vocab_size=4096, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=16, target_modules=LINEARS))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            parameter.copy_(parameter.bfloat16())
    return model.to("cuda", dtype).eval()


@torch.no_grad()
def logits(causal: Any) -> torch.Tensor:
    """After the prompts, and after three more tokens through the cache: [4, B, V]."""
    torch.manual_seed(1)
    longest = max(LENGTHS)
    ids = torch.randint(0, 4096, (len(LENGTHS), longest), device="cuda")
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in LENGTHS]).cuda()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    said = causal(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    found = [said.logits[:, -1].float()]

    for more in range(3):
        mask = torch.cat([mask, mask.new_ones(len(LENGTHS), 1)], dim=1)
        token = torch.full((len(LENGTHS), 1), 7 + more, device="cuda")
        positions = mask.sum(1, keepdim=True) - 1
        cache = said.past_key_values
        said = causal(
            input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        found.append(said.logits[:, -1].float())
    return torch.stack(found)


def test_generation_is_as_exact_as_transformers_own() -> None:
    oracle = logits(make(torch.float32).get_base_model())
    model = make(torch.bfloat16)
    causal = model.get_base_model()
    eager = (logits(causal) - oracle).norm() / oracle.norm()
    fused = FusedLayers(causal, [ActivationPolicy.SAVE_ALL] * 4, torch.bfloat16, keep_dequantized=True)
    assert packed_attention.use_packed_attention(causal) is None
    patch_model(model, keep_dequantized=False)
    ours = (logits(causal) - oracle).norm() / oracle.norm()
    print("error of eager", eager.item(), "ours", ours.item())

    assert ours <= RATIO * eager
    fused.move_vocabulary()
    assert (logits(causal) - oracle).norm() / oracle.norm() <= RATIO * eager, "with the embedding in host memory"
    AttentionMaskInterface.register(packed_attention.NAME, lambda **_: None)
    try:
        assert (logits(causal) - oracle).norm() / oracle.norm() > 10 * eager, "padding is seen without its mask"
    finally:
        packed_attention.use_packed_attention(causal)
