"""On a GPU in bfloat16: errors of our layers against an fp32 oracle, as a share of eager PyTorch's own."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from finetune_kernels.decoder_layer import Keep
from finetune_kernels.fused_layers import FusedLayers
from finetune_kernels.layer_builder import why_not_fused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATIO = 1.1


def make(family: str, dtype: torch.dtype) -> Any:
    """Two layers of an 8B model's width, equal weights whatever the type."""
    config = CONFIGS[family](
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4,
        head_dim=128, vocab_size=4096, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            parameter.copy_(parameter.bfloat16())
    return model.to("cuda", dtype)


def results(model: Any, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    total = sum(lengths)
    tokens = torch.randint(0, 4096, (1, total), device="cuda")
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).cuda()
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    model.zero_grad()
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False, **options).logits
    (logits.float() * torch.randn(logits.shape, device="cuda")).sum().backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": logits.detach().float()}


def errors(found: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: ((found[name] - value).norm() / value.norm()).item() for name, value in oracle.items()}


@pytest.mark.parametrize("lengths", [(512, 512), (700, 24, 300)])  # cuDNN's kernel, FlashAttention's
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_errors_are_no_larger_than_those_of_eager_bf16(family: str, lengths: tuple[int, ...]) -> None:
    oracle = results(make(family, torch.float32), lengths)
    model = make(family, torch.bfloat16)
    eager = errors(results(model, lengths), oracle)
    causal = model.get_base_model()
    assert why_not_fused(causal) is None
    fused = FusedLayers(causal, [Keep.EVERYTHING] * 2, torch.bfloat16, resident=True)
    ours = errors(results(model, lengths), oracle)
    worst = max(ours[name] / eager[name] for name in eager)
    print(family, lengths, "worst ratio", worst, "mean", sum(ours[n] / eager[n] for n in eager) / len(eager))
    assert worst <= RATIO, {name: (ours[name], eager[name]) for name in eager if ours[name] > RATIO * eager[name]}
    for keep in (Keep.ATTENTION, Keep.INPUT, Keep.HOST):
        fused.keep([keep] * 2)
        again = errors(results(model, lengths), oracle)
        assert max(again[name] / eager[name] for name in eager) <= RATIO, keep
    fused.layers[1].eps *= 1e5
    assert max(value / eager[name] for name, value in errors(results(model, lengths), oracle).items()) > 2
