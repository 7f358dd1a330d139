"""A layer as one function computes what transformers and peft compute, whatever it keeps in between."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_devcluster import chat_data
from finetune_devcluster.tiny_model import make_tiny_model
from finetune_kernels.decoder_layer import Keep
from finetune_kernels.fused_layers import FusedLayers, why_not_fused

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"]
DOCUMENTS = (17, 5, 18)  # tokens
DEVICE = "cpu"  # fp32; tests in bfloat16 are in test_gpu_layers.py


def adapted(family: str, folder: Path, **options: Any) -> Any:
    texts = [message["content"] for chat in islice(chat_data.conversations(), 20) for message in chat]
    path = make_tiny_model(folder, family=family, texts=texts)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(DEVICE)
    options = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": LINEARS} | options
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "norm" in name or name.endswith("bias"):
                parameter.normal_(mean=1.0, std=0.2)
    return model


def results(model: Any, *, packed: bool) -> dict[str, torch.Tensor]:
    """Logits and gradients for one row of three documents, or for two rows of one length."""
    model.zero_grad()
    if packed:
        tokens = torch.arange(3, 3 + sum(DOCUMENTS), device=DEVICE).unsqueeze(0)
        positions = torch.cat([torch.arange(length) for length in DOCUMENTS]).unsqueeze(0).to(DEVICE)
        ends = torch.tensor([0, *DOCUMENTS], device=DEVICE).cumsum(0).to(torch.int32)
        options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 18, "max_length_k": 18}
    else:
        tokens = torch.arange(3, 43, device=DEVICE).view(2, 20)
        positions, options = torch.arange(20, device=DEVICE).expand(2, -1), {}
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False, **options).logits
    torch.manual_seed(2)
    (logits * torch.randn(logits.shape).to(DEVICE)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": logits.detach()}


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of any tensor, relative to the tensor's largest entry."""
    assert found.keys() == expected.keys()
    assert all(value.abs().max() > 0 for value in expected.values())
    return max(((found[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items())


def fuse(model: Any, keep: Keep, *, resident: bool = True) -> FusedLayers:
    causal = model.get_base_model()
    assert why_not_fused(causal, longest=40) is None
    return FusedLayers(causal, [keep] * len(causal.model.layers), torch.float32, resident=resident)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family: str, packed: bool, tmp_path: Path) -> None:
    model = adapted(family, tmp_path)
    expected = results(model, packed=packed)
    fused = fuse(model, Keep.EVERYTHING)
    assert differences(results(model, packed=packed), expected) < 2e-4  # 1e-5 was measured, 3e-5 on Phi
    fused.layers[0].scale *= 1.1
    assert differences(results(model, packed=packed), expected) > 2e-3


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("keep", [Keep.ATTENTION, Keep.INPUT, Keep.HOST])
def test_what_is_kept_changes_nothing(family: str, keep: Keep, tmp_path: Path) -> None:
    model = adapted(family, tmp_path)
    fused = fuse(model, Keep.EVERYTHING)
    expected = results(model, packed=True)
    fused.keep([keep] * len(fused.layers))
    fused.release_weights()
    assert differences(results(model, packed=True), expected) < 1e-5


def test_adapters_on_some_layers_only(tmp_path: Path) -> None:
    model = adapted("qwen2", tmp_path, target_modules=["q_proj", "v_proj", "down_proj"])
    expected = results(model, packed=True)
    fuse(model, Keep.INPUT)
    assert differences(results(model, packed=True), expected) < 2e-4


def test_a_changed_adapter_is_seen(tmp_path: Path) -> None:
    model = adapted("llama", tmp_path)
    fuse(model, Keep.EVERYTHING)
    before = results(model, packed=True)["logits"]
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(0.1)
    assert (results(model, packed=True)["logits"] - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "options", "longest", "reason"),
    [
        ("gemma2", {}, 40, "the layers of Gemma2ForCausalLM are not known"),
        ("llama", {"lora_dropout": 0.1}, 40, "adapter dropout"),
        ("llama", {"use_dora": True}, 40, "DoRA"),
    ],
)
def test_what_is_not_known_is_said(
    family: str, options: dict[str, Any], longest: int, reason: str, tmp_path: Path
) -> None:
    model = adapted(family, tmp_path, **options)
    assert why_not_fused(model.get_base_model(), longest) == reason
