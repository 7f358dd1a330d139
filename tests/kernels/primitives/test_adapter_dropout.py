"""Adapters that drop a part of their inputs, inside fused layers: transformers and peft with the same masks compute the
same, whatever a layer keeps and however it is cut into tiles; and the masks are random."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from finetune_kernels.layers import decoder_layer
from finetune_kernels.layers.blocks import mlp_block, tiled_mlp
from finetune_kernels.layers.decoder_layer import DecoderLayer
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.layer_check import why_not_fused
from finetune_kernels.layers.mlp_builder import PROJECTIONS
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.primitives import adapter_dropout
from finetune_kernels.primitives.adapter_dropout import DropoutSeed, Mask, new_dropout_seed
from finetune_test_kernels.small_layers import LINEARS, drop_by, one_pass, small_model
from finetune_test_kernels.tensor_checks import DEVICE, largest_error, normal, relative_error

TOLERANCE = 5e-6  # fp32; 3e-7 was measured over these shapes
PRODUCTS = TOLERANCE if DEVICE == "cpu" else 5e-3  # a GPU multiplies fp32 tiles in TF32
LAYERS = 2e-4  # as in test_fused_layers.py; 4e-6 was measured here, 1.4 with a mistake
LENGTH = 13
in_the_interpreter = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU in bfloat16: test_gpu_layers.py")


@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
@pytest.mark.parametrize("first_row", [0, 2048])
@pytest.mark.parametrize(("t", "n", "rank"), [(1, 1, 1), (13, 130, 7), (33, 257, 100), (64, 128, 16)])
def test_the_kernels_are_their_formulas(t: int, n: int, rank: int, first_row: int, p: float) -> None:
    mask = Mask(DropoutSeed(2**31 - 1, first_row), 7, p)
    x, dx, d, a = normal(t, n + 3)[:, :n], normal(t, n, seed=1), normal(t, rank + 2, seed=2), normal(rank, n, seed=3)
    before = x.clone()
    y = adapter_dropout.drop(x, mask)
    assert torch.equal(x, before)
    assert torch.equal(y != 0, adapter_dropout.keep_mask(mask, t, n, DEVICE))
    assert torch.equal(y, adapter_dropout.reference(x, mask))
    exact = adapter_dropout.reference_add_lora_dx(dx.double(), d[:, :rank].double(), a.double(), mask)
    assert adapter_dropout.add_lora_dx(dx, d[:, :rank], a, mask) is dx
    assert relative_error(dx, exact) < PRODUCTS


def test_words_are_those_of_the_published_generator() -> None:
    """Random123's known answer for philox4x32 with 7 rounds, key and counter 0."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(word) for word in adapter_dropout._philox(0, zero, zero, zero)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    halves = torch.tensor([half for word in words for half in (word & 0xFFFF, word >> 16)])
    for p in (0.1, 0.5, 0.9):
        mask = Mask(DropoutSeed(0), 0, p)
        assert torch.equal(adapter_dropout.keep_mask(mask, 1, 8)[0], halves >= mask.threshold)


def test_no_rows_are_harmless() -> None:
    mask = Mask(DropoutSeed(1), 0, 0.5)
    assert adapter_dropout.drop(normal(0, 5), mask).shape == (0, 5)
    assert adapter_dropout.add_lora_dx(normal(0, 5), normal(0, 2), normal(2, 5), mask).shape == (0, 5)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_a_fraction_p_is_dropped_in_every_row_and_column(p: float) -> None:
    rows, columns = 512, 1024
    mask = adapter_dropout.keep_mask(Mask(DropoutSeed(3), 2, p), rows, columns).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 5 * deviation / (rows * columns) ** 0.5
    for along, count in ((0, rows), (1, columns)):
        normed = (mask.mean(along) - (1 - p)) / (deviation / count**0.5)
        assert normed.abs().max() < 5  # of 1,024 normal values: 3.3 is usual
        assert 0.8 < normed.var() < 1.2  # a pattern in rows or columns would spread or narrow it


def test_masks_of_other_linears_passes_rows_and_seeds_have_nothing_in_common() -> None:
    size = (256, 512)
    named = {
        "a mask": Mask(DropoutSeed(3), 2, 0.5),
        "another linear": Mask(DropoutSeed(3), 3, 0.5),
        "another pass": Mask(DropoutSeed(4), 2, 0.5),
        "rows further on": Mask(DropoutSeed(3, first_row=1), 2, 0.5),
        "a seed far away": Mask(DropoutSeed(2**30 + 3), 2, 0.5),
    }

    masks = {name: adapter_dropout.keep_mask(mask, *size).double() - 0.5 for name, mask in named.items()}
    bound = 5 * 0.25 / (size[0] * size[1]) ** 0.5
    for one, other in combinations(masks, 2):
        assert abs((masks[one] * masks[other]).mean()) < bound, (one, other)

    first = masks["a mask"]
    for shift in range(1, 17):  # half words of one counter, and of the next
        assert abs((first * first.roll(shift, 1)).mean()) < bound
    assert abs((first * adapter_dropout.keep_mask(named["a mask"], *size)).mean()) > bound  # itself is found


def test_probabilities_between_two_steps_are_rounded_and_nothing_changes_on_average() -> None:
    for p in (0.0, 1e-9, 0.05, 1 / 3, 0.999999):
        mask = Mask(DropoutSeed(1), 0, p)
        assert abs(mask.threshold / adapter_dropout.STEPS - p) <= 1 / adapter_dropout.STEPS
        assert mask.factor * (1 - mask.threshold / adapter_dropout.STEPS) == pytest.approx(1, abs=1e-15)


def test_a_tile_has_the_rows_of_the_whole() -> None:
    mask = Mask(DropoutSeed(9), 1, 0.3)
    whole = adapter_dropout.keep_mask(mask, 40, 24)
    assert torch.equal(whole[17:], adapter_dropout.keep_mask(mask.from_row(10).from_row(7), 23, 24))
    x = normal(40, 24)
    assert torch.equal(adapter_dropout.drop(x, mask)[17:], adapter_dropout.drop(x[17:], mask.from_row(17)))


def test_draws_follow_the_state_of_the_cpu_generator() -> None:
    """A checkpoint keeps that state (tests/trainer/test_resume.py)."""
    state = torch.get_rng_state()
    first, second = new_dropout_seed(), new_dropout_seed()
    assert first != second
    torch.set_rng_state(state)
    assert (new_dropout_seed(), new_dropout_seed()) == (first, second)


def results(model: Any) -> dict[str, torch.Tensor]:
    """Logits and gradients of one pass; its masks are the same at every call."""
    torch.manual_seed(7)
    return one_pass(model, LENGTH)


def by_peft(kind: str, **options: Any) -> dict[str, torch.Tensor]:
    """Results of transformers and peft with the masks that `results` of fused layers will have."""
    model = small_model(kind, torch.float32, layers=2, **options).to(DEVICE)
    torch.manual_seed(7)
    drop_by(model.get_base_model(), [new_dropout_seed(), new_dropout_seed()])
    return results(model)


def fused(kind: str, **options: Any) -> tuple[Any, FusedLayers]:
    model = small_model(kind, torch.float32, layers=2, **options).to(DEVICE)
    assert why_not_fused(model.get_base_model()) is None
    return model, FusedLayers(
        model.get_base_model(), [ActivationPolicy.SAVE_ALL] * 2, torch.float32, keep_dequantized=True
    )


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"lora_dropout": 0.3}),
    "llama, some adapters": ("llama", {"lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "llama, ranks of their own": ("llama", {"lora_dropout": 0.3, "rank_pattern": {"k_proj": 5}, "use_rslora": True}),
    "qwen2, with biases": ("qwen2", {"lora_dropout": 0.1}),
    "phi3, merged projections": ("phi3", {"lora_dropout": 0.5}),
    "gemma2": ("gemma2", {"lora_dropout": 0.3}),
}


@in_the_interpreter
def test_kernels_and_peft_compute_the_same_with_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_peft("llama", lora_dropout=0.3)
    model, layers = fused("llama", lora_dropout=0.3)
    assert largest_error(results(model), expected) < LAYERS
    layers.set_policies([ActivationPolicy.RECOMPUTE_ALL] * 2)
    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", 8)
    assert largest_error(results(model), expected) < LAYERS


@in_the_interpreter
@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("case", CASES)
def test_layers_compute_what_peft_computes_whatever_is_kept(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = CASES[case]
    expected = by_peft(kind, **options)
    model, layers = fused(kind, **options)
    for policy in ActivationPolicy:
        layers.set_policies([policy] * 2)
        assert largest_error(results(model), expected) < LAYERS, policy

    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", 4)
    for policy in (ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.RECOMPUTE_ALL, ActivationPolicy.OFFLOAD):
        layers.set_policies([policy] * 2)
        assert layers.layers[0].is_tiled(LENGTH)
        assert largest_error(results(model), expected) < LAYERS, f"{policy} in tiles"

    drawn = iter([new_dropout_seed(), new_dropout_seed()])
    monkeypatch.setattr(decoder_layer, "new_dropout_seed", lambda: next(drawn))
    assert largest_error(results(model), expected) > 0.05  # other masks are noticed


def in_backward_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed is not kept: what is made in backward has masks of its own."""
    restore = decoder_layer._restore

    def forgetful(ctx: Any, layer: DecoderLayer) -> Any:
        ctx.pass_ctx = layer.begin()
        return restore(ctx, layer)

    monkeypatch.setattr(decoder_layer, "_restore", forgetful)


def from_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile has the masks of the first one."""
    monkeypatch.setattr(mlp_block.MlpPass, "from_row", lambda self, row: self)


def one_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """All linears of a layer have one stream."""
    monkeypatch.setattr("finetune_kernels.layers.linear_group.Mask", lambda draw, stream, p: Mask(draw, 0, p))


@in_the_interpreter
@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("mistake", [in_backward_again, from_the_first_row, one_for_all])
def test_a_mistake_with_masks_is_noticed(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_peft("llama", lora_dropout=0.3)
    model, layers = fused("llama", lora_dropout=0.3)
    layers.set_policies([ActivationPolicy.RECOMPUTE_ALL] * 2)
    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", 4)
    assert largest_error(results(model), expected) < LAYERS
    mistake(monkeypatch)
    assert largest_error(results(model), expected) > 0.05


@in_the_interpreter
def test_each_pass_has_masks_of_its_own() -> None:
    model, _ = fused("llama", lora_dropout=0.3)
    tokens = torch.arange(3, 9).unsqueeze(0)
    first, second = (model(input_ids=tokens, use_cache=False).logits for _ in range(2))
    assert relative_error(first, second) > 0.01


@in_the_interpreter
def test_nothing_is_drawn_or_dropped_in_evaluation_or_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> DropoutSeed:
        raise AssertionError("a draw")

    monkeypatch.setattr(decoder_layer, "new_dropout_seed", draw)
    plain, _ = fused("llama")
    expected = results(plain)
    model, _ = fused("llama", lora_dropout=0.3)
    model.eval()
    for name, value in results(model).items():
        assert torch.equal(value, expected[name]), name
    model.train()
    with pytest.raises(AssertionError, match="a draw"):
        results(model)


def test_every_linear_of_a_layer_has_a_philox_stream_of_its_own() -> None:
    for kind in ("llama", "phi3"):
        _, layers = fused(kind, lora_dropout=0.3)
        streams = [
            mask.philox_stream for group in layers.layers[0].groups for mask in group.begin(DropoutSeed(1)).inputs.masks
        ]
        assert len(set(streams)) == len(streams) == (4 if kind == "phi3" else 7)
    assert set(LINEARS) <= set(PROJECTIONS)
    assert len(set(PROJECTIONS)) == len(PROJECTIONS), "each name has an index of its own"


def test_the_mode_of_a_pass_is_that_of_its_forward() -> None:
    """A model that is switched to evaluation between forward and backward has the gradients of what ran forward."""
    model, layers = fused("llama", lora_dropout=0.3)
    group = layers.layers[0].groups[0]
    pass_ctx = group.begin(DropoutSeed(3))
    model.eval()
    assert [mask.p for mask in pass_ctx.inputs.masks] == [0.3] * 3
    assert replace(pass_ctx.inputs.masks[0], p=0.3) == pass_ctx.inputs.masks[0]
    assert not group.begin(DropoutSeed(3)).drops
