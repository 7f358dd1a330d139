"""Patched modules compute what transformers' own do, and the report says which were patched."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_kernels.layers.patching import patch_model, plan_patches
from finetune_kernels.layers.supervised_loss import fused_supervised_loss, has_plain_head
from finetune_test_kernels.quantized_layers import linears_of, quantized_model
from finetune_test_models import chat_data
from finetune_test_models.tiny_model import make_tiny_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"]

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")
"""Families whose every linear layer has a kernel; all of them: planning/test_families_unfused.py."""


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
    loss = fused_supervised_loss(model, inputs, labels, torch.arange(8, 39), None)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_a_patched_model_has_the_same_loss_and_gradients(family: str, tmp_path: Path) -> None:
    model = adapted(family, tmp_path)
    assert has_plain_head(model)
    expected, gradients = loss_and_gradients(model)
    report = patch_model(model, keep_dequantized=False)
    assert report.norms >= 5
    assert report.mlps == 2

    assert report.adapters == (8 if family == "phi3" else 14)
    assert not report.left
    found, ours = loss_and_gradients(model)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).abs().max() <= 2e-4 * gradient.abs().max(), name  # fp32; 3e-5 was measured


@pytest.mark.parametrize("keep", [False, True], ids=["decoded in each pass", "kept"])
def test_weights_in_nf4_are_those_that_bitsandbytes_decodes(keep: bool) -> None:
    model = quantized_model(1)
    expected, gradients = loss_and_gradients(model)
    report = patch_model(model, keep_dequantized=keep)
    linears = linears_of(model.get_base_model().model.layers[0])
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    assert (report.adapters, report.dequantized_bytes) == (7, 4 * weights if keep else 0)

    found, ours = loss_and_gradients(model)
    assert torch.allclose(found, expected, rtol=1e-5)
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).abs().max() <= 2e-4 * gradient.abs().max(), name


@pytest.mark.parametrize(
    ("options", "reason"), [({"lora_dropout": 0.1}, "adapter dropout"), ({"use_dora": True}, "DoRA")]
)
def test_what_is_computed_otherwise_is_left_and_said(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    report = patch_model(adapted("llama", tmp_path, **options), keep_dequantized=False)
    assert (report.adapters, report.left) == (0, {reason: 14})
    assert reason in str(report)


def rename_norms(model: Any) -> None:
    """Renames the norms, as a version of transformers might."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.__class__ = type("LlamaNorm", (type(module),), {})


def rename_mlps(model: Any) -> None:
    for layer in model.get_base_model().model.layers:
        layer.mlp.__class__ = type("LlamaFeedForward", (type(layer.mlp),), {})


def rename_adapters(model: Any) -> None:
    """Renames A, as a version of peft might."""
    for module in list(model.modules()):
        if hasattr(module, "lora_A"):
            module._modules["lora_down"] = module._modules.pop("lora_A")


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (rename_norms, "5 norms were expected"),
        (rename_mlps, "2 mlps were expected"),
        (rename_adapters, "14 adapters were expected"),
    ],
)
def test_nothing_replaced_where_more_was_planned_is_an_error(
    rename: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    model = adapted("llama", tmp_path)
    assert plan_patches(model) == (5, 2, 14)
    rename(model)
    with pytest.raises(RuntimeError, match=said):
        patch_model(model, keep_dequantized=False)


def test_an_unknown_architecture_has_nothing_planned_but_its_adapters(tmp_path: Path) -> None:
    model = adapted("llama", tmp_path)
    causal = model.get_base_model()
    causal.__class__ = type("OtherForCausalLM", (type(causal),), {})
    rename_norms(model)
    rename_mlps(model)
    report = patch_model(model, keep_dequantized=False)
    assert report.planned == (0, 0, 14)
    assert (report.norms, report.mlps, report.adapters) == (0, 0, 14)


def test_a_reason_is_no_error(tmp_path: Path) -> None:
    model = adapted("llama", tmp_path)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.requires_grad_(True)
    report = patch_model(model, keep_dequantized=False)
    assert (report.norms, report.mlps, report.left) == (0, 2, {"norm weights that train": 5})
