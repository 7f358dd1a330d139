"""Fused layers in fp16, for cards without bfloat16: logits and gradients in Triton's interpreter, a curve of losses
with loss scaling, and a residual stream that fp16 cannot hold. On a GPU: tests/trainer/training/test_gpu_fp16.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from finetune_kernels.layers.blocks import layer_input_block
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.supervised_loss import fused_supervised_loss
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import FAMILIES
from finetune_kernels.primitives.multi_tensor_adamw import MultiTensorAdamW
from finetune_test_kernels.small_layers import one_pass, small_model
from finetune_test_kernels.tensor_checks import DEVICE
from finetune_trainer.training.divergence.loss_scale import LossScale, clip_scaled

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU: tests/trainer/training/test_gpu_fp16.py")
HALF = torch.float16
LENGTH, STEPS = 9, 40
NEAR = 0.01
"""Relative difference of losses, of which 0.0047 was measured."""


def model_in(dtype: torch.dtype, kind: str, **options: Any) -> Any:
    """A model whose frozen weights fp16 can say; adapters are fp32, as in training."""
    model = small_model(kind, torch.float32, layers=2, **options)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.half().to(dtype)
    return model


def fuse(model: Any, policy: ActivationPolicy) -> FusedLayers:
    return FusedLayers(model.get_base_model(), [policy] * 2, HALF, keep_dequantized=True)


def pass_in_fp16(model: Any) -> dict[str, torch.Tensor]:
    """Logits and gradients, under autocast as the trainer's."""
    with torch.autocast("cpu", HALF):
        return one_pass(model, LENGTH)


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest root mean square error of a tensor, over the tensor's own."""
    errors = {name: (found[name].float() - value).norm() / value.norm() for name, value in expected.items()}
    return float(max(errors.values()))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gemma4_text"])
def test_logits_and_gradients_are_those_of_transformers_in_fp32(kind: str) -> None:
    expected = one_pass(model_in(torch.float32, kind), LENGTH)
    model = model_in(HALF, kind)
    layers = fuse(model, ActivationPolicy.SAVE_ALL)
    for policy in (ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_ALL):
        layers.set_policies([policy] * 2)
        assert worst(pass_in_fp16(model), expected) < 0.02, policy  # 0.0102 and 0.0021 were measured

    half = layers.layers[0].mixer
    half.params = replace(half.params, scale=1.1 * half.params.scale)
    assert worst(pass_in_fp16(model), expected) > 0.04, "the control, of 0.11 for Gemma"


def large_gemma(dtype: torch.dtype, kind: str) -> Any:
    """A Gemma whose residual stream grows to 100,000."""
    model = model_in(dtype, kind)
    for layer in model.get_base_model().model.layers:
        layer.post_feedforward_layernorm.weight.data.fill_(40_000.0)
        if kind == "gemma4_text":  # what reads the stream without a norm has to bring it back
            for weight in layer.per_layer_input_gate.parameters():
                weight.data.mul_(0.01)
    return model


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("kind", ["gemma3_text", "gemma4_text"])
def test_a_residual_stream_beyond_fp16_is_kept_in_fp32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one_pass(large_gemma(torch.float32, kind), LENGTH)["logits"]
    model = large_gemma(HALF, kind)
    layers = fuse(model, ActivationPolicy.SAVE_ALL)
    assert layers.is_wide
    for policy in ActivationPolicy:
        layers.set_policies([policy] * 2)
        found = pass_in_fp16(model)
        assert worst({"logits": found["logits"]}, {"logits": expected}) < 5e-3, policy
        assert all(value.isfinite().all() for value in found.values())

    if kind == "gemma4_text":
        with monkeypatch.context() as patch:
            patch.setattr(layer_input_block, "WIDE_STEP", 1.0)
            assert not pass_in_fp16(model)["logits"].isfinite().all(), "the control: it was not divided"
    layers.is_wide = False
    assert not pass_in_fp16(model)["logits"].isfinite().all(), "the control: fp16 cannot hold it"


def test_families_that_overflow_norm_what_their_blocks_read() -> None:
    """A block that read the residual stream itself, in fp16, would overflow all the same; Gemma 4's third divides
    it."""
    wide = {family.model_type: family for family in FAMILIES if family.overflows_fp16}
    assert wide.keys() == {"gemma", "gemma2", "gemma3_text", "gemma4_text", "vaultgemma"}
    assert all(len(family.pre_norms) == 2 and family.mixer is None for family in wide.values())


def train(dtype: torch.dtype, first_scale: float | None = None) -> list[float]:
    """Losses of some steps: fused in fp16 with a loss scale, or by transformers in fp32 without."""
    model, scale = model_in(dtype, "llama"), None
    if first_scale is not None:
        fuse(model, ActivationPolicy.RECOMPUTE_MLP)
        scale = LossScale()
        scale.value = first_scale
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = MultiTensorAdamW(weights, torch.optim.AdamW, lr=5e-3)

    tokens = torch.randint(3, 24, (4, 1, 16), generator=torch.Generator().manual_seed(1))
    place = torch.arange(16).unsqueeze(0)
    losses = []
    for step in range(STEPS):
        row = tokens[step % 4]
        with torch.autocast("cpu", HALF, enabled=scale is not None):
            loss = fused_supervised_loss(model, {"input_ids": row, "position_ids": place}, row, place[0, :-1], None)
        losses.append(loss.item())
        (loss if scale is None else scale.scale(loss)).backward()
        clip_scaled(optimizer, 1.0, lambda part: part, scale)
        optimizer.step() if scale is None else scale.step(optimizer)
        if scale is not None:
            scale.update()
        for weight in weights:
            weight.grad = None
    return losses


@pytest.mark.usefixtures("in_pytorch")
def test_losses_of_a_run_in_fp16_follow_those_in_fp32() -> None:
    exact, ours = train(torch.float32), train(HALF, 2.0**8)
    assert sum(exact[-4:]) < 0.9 * sum(exact[:4]), "it learns"
    assert off(ours, exact) < NEAR

    lost = train(HALF, 2.0**-20)
    assert off(lost, exact) > 10 * NEAR, "the control: gradients below what fp16 can say"


def off(losses: list[float], exact: list[float]) -> float:
    """Largest relative difference of a step's loss."""
    return max(abs(one - other) / other for one, other in zip(losses, exact, strict=True))
