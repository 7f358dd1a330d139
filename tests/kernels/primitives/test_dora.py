"""DoRA inside fused layers: peft's own layers compute the same, whatever is kept, over 4-bit weights too; and the norms
of rows are made without the adapted weights."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_kernels.layers import linear_group
from finetune_kernels.layers.blocks import tiled_mlp
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.layer_check import why_not_fused
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.lora_pass import PlainOutputs
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.primitives import dora
from finetune_kernels.primitives.lora_delta import LoraDelta
from finetune_test_kernels.small_layers import one_pass, small_model
from finetune_test_kernels.tensor_checks import DEVICE, largest_error, normal, relative_error

LAYERS = 2e-4  # as in test_fused_layers.py; 5e-6 was measured here
LENGTH = 13
in_the_interpreter = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU in bfloat16: test_gpu_layers.py")


@pytest.mark.parametrize(("out", "features", "rank"), [(1, 1, 1), (24, 40, 7), (130, 96, 64)])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_norms_of_rows_are_those_of_the_adapted_weights(out: int, features: int, rank: int, size: float) -> None:
    w, a, b = normal(out, features), normal(rank, features, seed=1), size * normal(out, rank, seed=2)
    exact = dora.reference_row_norms(w.double(), a.double(), b.double(), 0.7)
    assert (
        relative_error(dora.row_norms(w, dora.row_squares(w), a, b, 0.7), exact) < 5e-6
    )  # 1.1e-7 was measured, 1e-5 to 0.1 with a factor wrong by a tenth
    assert relative_error(dora.row_norms(w, dora.row_squares(w), a, b, 0.77), exact) > 1e-5  # up to 0.1


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = call(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


def test_no_tensor_of_the_weights_size_is_made_for_the_norms() -> None:
    w, a, b = normal(300, 200), normal(4, 200, seed=1), normal(300, 4, seed=2)
    with Largest() as largest:
        dora.row_norms(w, dora.row_squares(w), a, b, 0.7)
    assert largest.elements <= 300 * 4
    with Largest() as largest:
        dora.reference_row_norms(w, a, b, 0.7)
    assert largest.elements == 300 * 200


@pytest.mark.parametrize("chunk", [3, 2048])
def test_the_gradient_of_magnitudes_is_summed_over_chunks_of_rows(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "CHUNK", chunk)
    dy, x, w, a, b = normal(7, 5), normal(7, 4, seed=1), normal(5, 4, seed=2), normal(2, 4, seed=3), normal(5, 2)
    norms = dora.row_norms(w, dora.row_squares(w), a, b, 0.7)
    before = dy.clone()
    found = dora.magnitude_gradient(dy, x, w, LoraDelta(x @ a.T, b, 0.7), norms)
    assert torch.equal(dy, before)
    assert relative_error(found, (dy * (x @ (w + 0.7 * b @ a).T)).sum(0) / norms) < 1e-5


def over_four_bits(*, magnitudes: bool) -> list[Any]:
    """peft's layers over NF4 weights; rows of whole blocks (test_nf4.py says why)."""
    torch.manual_seed(0)
    options = {"compute_dtype": torch.float32, "quant_type": "nf4"}
    sizes = {"q_proj": 128, "k_proj": 64}
    plain = torch.nn.ModuleDict(
        {name: bnb.nn.Linear4bit(64, size, bias=True, **options) for name, size in sizes.items()}
    )
    plain.to(DEVICE)
    get_peft_model(plain, LoraConfig(r=4, lora_alpha=6, target_modules=list(sizes), use_dora=magnitudes))  # type: ignore[arg-type]
    for parameter in plain.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return list(plain.values())


@in_the_interpreter
@pytest.mark.parametrize("keep_dequantized", [True, False])
def test_layers_over_four_bit_weights_are_pefts(keep_dequantized: bool) -> None:
    layers = over_four_bits(magnitudes=True)
    group = LinearGroup(layers, torch.float32, keep_dequantized=keep_dequantized)
    x, dy = normal(5, 64).requires_grad_(), normal(5, 192, seed=1)
    expected = linear_group.reference(layers, x)
    exact = torch.autograd.grad(expected, [x, *group.parameters], dy)

    with torch.no_grad():
        pass_ctx = group.begin(None)
        y, xa = group.forward(x, pass_ctx)
        dx, d_xa = group.backward(dy, pass_ctx)
        found = [dx, *group.gradients(dy, x, xa, d_xa, pass_ctx)]

    assert len(found) == 7
    assert relative_error(y, expected) < 5e-6
    for ours, truth in zip(found, exact, strict=True):
        assert relative_error(ours, truth) < 5e-6


def made(kind: str, **options: Any) -> Any:
    model = small_model(kind, torch.float32, layers=2, use_dora=True, **options).to(DEVICE)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value.add_(1)
    return model


def fuse(model: Any) -> FusedLayers:
    assert why_not_fused(model.get_base_model()) is None
    return FusedLayers(model.get_base_model(), [ActivationPolicy.SAVE_ALL] * 2, torch.float32, keep_dequantized=True)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, some adapters": ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "llama, ranks of their own": ("llama", {"rank_pattern": {"k_proj": 5}, "use_rslora": True}),
    "qwen2, with biases": ("qwen2", {}),
    "phi3, merged projections": ("phi3", {}),
    "gemma2": ("gemma2", {}),
}


@in_the_interpreter
@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("case", CASES)
def test_layers_compute_what_peft_computes_whatever_is_kept(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = CASES[case]
    model = made(kind, **options)
    expected = one_pass(model, LENGTH)
    assert sum("magnitude" in name for name in expected) >= 6
    layers = fuse(model)
    for policy in ActivationPolicy:
        layers.set_policies([policy] * 2)
        assert largest_error(one_pass(model, LENGTH), expected) < LAYERS, policy

    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", 4)
    for policy in (ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.RECOMPUTE_ALL, ActivationPolicy.OFFLOAD):
        layers.set_policies([policy] * 2)
        assert largest_error(one_pass(model, LENGTH), expected) < LAYERS, f"{policy} in tiles"

    magnitude = next(value for name, value in model.named_parameters() if "magnitude" in name)
    with torch.no_grad():
        magnitude.mul_(1.05)
    assert largest_error(one_pass(model, LENGTH), expected) > 2e-3  # a changed magnitude is seen


@in_the_interpreter
def test_kernels_and_peft_compute_the_same() -> None:
    model = made("llama")
    expected = one_pass(model, LENGTH)
    layers = fuse(model)
    assert largest_error(one_pass(model, LENGTH), expected) < LAYERS
    layers.set_policies([ActivationPolicy.RECOMPUTE_ALL] * 2)
    assert largest_error(one_pass(model, LENGTH), expected) < LAYERS


def test_a_group_without_magnitudes_has_no_scales() -> None:
    group = LinearGroup(over_four_bits(magnitudes=False), torch.float32, keep_dequantized=True)
    assert isinstance(group.begin(None).outputs, PlainOutputs)
