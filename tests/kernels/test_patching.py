"""What is put into a model computes what was there, and the report tells it; the plan takes the fastest that fits."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_devcluster import chat_data
from finetune_devcluster.tiny_model import FAMILIES, make_tiny_model
from finetune_kernels.memory_plan import ModelShape, plan_memory
from finetune_kernels.patching import patch_model
from finetune_kernels.supervised_loss import has_plain_head, supervised_loss

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"]


def adapted(family: str, folder: Path, **options: Any) -> Any:
    texts = [message["content"] for chat in islice(chat_data.conversations(), 20) for message in chat]
    base = AutoModelForCausalLM.from_pretrained(
        make_tiny_model(folder, family=family, texts=texts), dtype=torch.float32
    )
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.arange(3, 43).unsqueeze(0)
    labels = tokens.clone()
    labels[0, :9] = -100
    inputs = {"input_ids": tokens, "position_ids": torch.arange(40).unsqueeze(0)}
    model.zero_grad()
    loss = supervised_loss(model, inputs, labels, None)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_patched_model_has_the_same_loss_and_gradients(family: str, tmp_path: Path) -> None:
    model = adapted(family, tmp_path)
    assert has_plain_head(model)
    expected, gradients = loss_and_gradients(model)
    report = patch_model(model, resident=False)
    assert report.norms >= 5
    assert report.mlps == 2
    assert report.adapters == (8 if family == "phi3" else 14)
    assert not report.left
    found, ours = loss_and_gradients(model)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).abs().max() <= 2e-4 * gradient.abs().max(), name  # fp32; 3e-5 was measured


@pytest.mark.parametrize(
    ("options", "reason"), [({"lora_dropout": 0.1}, "adapter dropout"), ({"use_dora": True}, "DoRA")]
)
def test_what_is_computed_otherwise_is_left_and_said(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    report = patch_model(adapted("llama", tmp_path, **options), resident=False)
    assert (report.adapters, report.left) == (0, {reason: 14})
    assert reason in str(report)


LLAMA_8B = ModelShape(
    layers=32, hidden=4096, key_value=1024, feed_forward=14336, vocabulary=128256, linear_parameters=6_979_321_856
)
GIB = 2**30
PLANS = {
    "an H200 keeps everything": (133, True, True),
    "a 40 GiB card dequantises": (34, True, False),
    "a 24 GiB card recomputes, with resident weights": (18, False, True),
    "a small card recomputes and dequantises": (8, False, False),
    "what fits nowhere gets the smallest": (0, False, False),
}


@pytest.mark.parametrize(("free_gib", "keep", "resident"), PLANS.values(), ids=PLANS)
def test_the_fastest_plan_that_fits_is_taken(free_gib: int, keep: bool, resident: bool) -> None:
    plan = plan_memory(LLAMA_8B, tokens=4096, free_bytes=free_gib * GIB)
    assert (plan.keep_activations, plan.resident_weights) == (keep, resident)
    assert "memory plan" in str(plan)
