"""What is put into a model computes what was there, and the report tells it; the plan takes the fastest that fits."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_api.vocabulary import MemoryMode
from finetune_kernels.layers.patching import patch_model, plan_patches
from finetune_kernels.layers.supervised_loss import fused_supervised_loss, has_plain_head
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory, smaller_plan
from finetune_kernels.planning.model_shape import ModelShape
from finetune_test_models import chat_data
from finetune_test_models.tiny_model import TINY_FAMILIES, make_tiny_model

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
    loss = fused_supervised_loss(model, inputs, labels, torch.arange(8, 39), None)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
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


@pytest.mark.parametrize(
    ("options", "reason"), [({"lora_dropout": 0.1}, "adapter dropout"), ({"use_dora": True}, "DoRA")]
)
def test_what_is_computed_otherwise_is_left_and_said(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    report = patch_model(adapted("llama", tmp_path, **options), keep_dequantized=False)
    assert (report.adapters, report.left) == (0, {reason: 14})
    assert reason in str(report)


def rename_norms(model: Any) -> None:
    """As if transformers had given its norms another name."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.__class__ = type("LlamaNorm", (type(module),), {})


def rename_mlps(model: Any) -> None:
    for layer in model.get_base_model().model.layers:
        layer.mlp.__class__ = type("LlamaFeedForward", (type(layer.mlp),), {})


def rename_adapters(model: Any) -> None:
    """As if peft kept A under another name."""
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


GIB = 2**30
LLAMA_8B = ModelShape(
    layers=32, hidden=4096, heads=32, key_value_heads=8, head_size=128, feed_forward=14336, vocabulary=128256,
    linear_parameters=6_979_321_856, adapter_parameters=41_943_040, quantized=True,
)  # fmt: skip
BASE = int(5.47 * GIB)


@pytest.mark.parametrize(
    ("gib", "mode", "keep_dequantized", "first", "last"),
    [
        (140, MemoryMode.FASTEST, True, ActivationPolicy.SAVE_ALL, ActivationPolicy.SAVE_ALL),
        (24, MemoryMode.FASTEST, False, ActivationPolicy.SAVE_ALL, ActivationPolicy.SAVE_ALL),
        (16, MemoryMode.FASTEST, False, ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.SAVE_ALL),
        (7, MemoryMode.FASTEST, False, ActivationPolicy.OFFLOAD, ActivationPolicy.OFFLOAD),
        (140, MemoryMode.BALANCED, False, ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.RECOMPUTE_MLP),
        (140, MemoryMode.SMALLEST, False, ActivationPolicy.OFFLOAD, ActivationPolicy.OFFLOAD),
    ],
)
def test_the_fastest_plan_that_fits_is_taken(
    gib: int, mode: MemoryMode, keep_dequantized: bool, first: ActivationPolicy, last: ActivationPolicy
) -> None:
    plan = plan_memory(LLAMA_8B, 4096, base_bytes=BASE, total_bytes=gib * GIB, mode=mode)
    assert (plan.keep_dequantized, plan.policies[0], plan.policies[-1]) == (keep_dequantized, first, last)
    assert plan.fits == (gib != 7)


def test_the_predicted_peak_is_what_was_measured() -> None:
    """On one H200, Llama 8B shape, 2 x 2048 tokens: 30.74 GiB kept whole, 6.50 GiB at the smallest."""
    for mode, measured in ((MemoryMode.FASTEST, 30.74), (MemoryMode.SMALLEST, 6.50)):
        plan = plan_memory(LLAMA_8B, 4096, base_bytes=BASE, total_bytes=140 * GIB, mode=mode)
        assert plan.peak_bytes / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("gib", "modes"),
    [
        (140, [MemoryMode.FASTEST, MemoryMode.BALANCED, MemoryMode.SMALLEST]),
        (12, [MemoryMode.FASTEST, MemoryMode.SMALLEST]),  # where Fastest keeps what Balanced does
        (7, [MemoryMode.SMALLEST]),
    ],
)
def test_after_memory_ran_out_the_next_mode_that_needs_less_is_taken(gib: int, modes: list[MemoryMode]) -> None:
    def plan_for(mode: MemoryMode) -> MemoryPlan:
        return plan_memory(LLAMA_8B, 4096, base_bytes=BASE, total_bytes=gib * GIB, mode=mode)

    plan: MemoryPlan | None = plan_for(MemoryMode.FASTEST)
    found = []
    while plan is not None:
        found.append(plan)
        plan = smaller_plan(plan, plan_for)
    assert [plan.mode for plan in found] == modes
    peaks = [plan.peak_bytes for plan in found]
    assert peaks == sorted(set(peaks), reverse=True)
