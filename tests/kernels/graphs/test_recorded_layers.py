"""Decoder layers that are launched as graphs compute what they compute kernel by kernel, pass after pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune_kernels.graphs import pass_shape
from finetune_kernels.graphs.layer_graphs import EAGER_PASSES, LayerGraphs
from finetune_kernels.graphs.recorded_function import Place
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import family_of_type
from finetune_test_kernels.family_settings import family_model
from finetune_test_kernels.rerun_recorder import Clock, RerunRecorder, Waiting
from finetune_test_kernels.small_layers import small_model
from finetune_test_kernels.tensor_checks import largest_error

CASES = [
    ("llama", ActivationPolicy.SAVE_ALL), ("llama", ActivationPolicy.RECOMPUTE_MLP),
    ("llama", ActivationPolicy.RECOMPUTE_ALL), ("gemma3_text", ActivationPolicy.SAVE_ALL),
    ("qwen3", ActivationPolicy.RECOMPUTE_MLP),
]  # fmt: skip
LAYERS = 2
# Documents of one shape: as many, as long in all, and the longest as long.
DOCUMENTS = [(4, 2), (2, 4), (4, 2), (2, 4), (4, 2)]
assert len(DOCUMENTS) > EAGER_PASSES + 1


def passes(model: Any, documents: list[tuple[int, ...]] = DOCUMENTS) -> list[dict[str, torch.Tensor]]:
    """Logits and gradients of one pass after the other, each with tokens of its own; adapters change between them."""
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = []
    for number, lengths in enumerate(documents):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(3, 24, (1, sum(lengths)), generator=generator)
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": 4}
        positions = torch.cat([torch.arange(length) for length in lengths])[None]

        run = model.get_base_model()
        logits = run(input_ids=tokens, position_ids=positions, use_cache=False, **bounds).logits
        d_logits = torch.randn(logits.shape, generator=generator)
        gradients = torch.autograd.grad(logits, list(weights.values()), d_logits)
        found.append(dict(zip(weights, map(torch.clone, gradients), strict=True)) | {"logits": logits.detach()})
        with torch.no_grad():
            for value in weights.values():
                value.mul_(0.9)
    return found


def fused(kind: str, policy: ActivationPolicy, **adapter: Any) -> tuple[Any, FusedLayers]:
    """A small model in fp32 whose layers are fused; `adapter` are LoraConfig's options."""
    model = small_model(kind, torch.float32, layers=LAYERS, **adapter).eval()
    causal = model.get_base_model()
    return model, FusedLayers(causal, [policy] * LAYERS, torch.float32, keep_dequantized=True)


def recorded(kind: str, policy: ActivationPolicy, **adapter: Any) -> tuple[Any, FusedLayers, RerunRecorder]:
    """The same, with recorded passes."""
    model, layers = fused(kind, policy, **adapter)
    recorder = RerunRecorder()
    layers.use_graphs(LayerGraphs(lambda: recorder, lambda: True, Waiting(), Clock()))
    return model, layers, recorder


@pytest.mark.parametrize(("kind", "policy"), CASES)
def test_passes_are_equal_to_the_bit(kind: str, policy: ActivationPolicy) -> None:
    expected = passes(fused(kind, policy)[0])
    model, _, recorder = recorded(kind, policy)
    for number, (one, other) in enumerate(zip(passes(model), expected, strict=True)):
        assert one.keys() == other.keys()
        assert [name for name, value in other.items() if not torch.equal(one[name], value)] == [], number
    assert recorder.launches == 2 * LAYERS * (len(DOCUMENTS) - EAGER_PASSES)


@pytest.mark.usefixtures("in_pytorch")
def test_experts_beside_an_mlp_are_recorded() -> None:
    """Gemma 4 26B-A4B, whose router runs again in backward."""
    family, recorder = family_of_type("gemma4_text"), RerunRecorder()
    assert family is not None
    results = []
    for graphs in (False, True):
        model = family_model(
            family, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16,
            hidden_size_per_layer_input=0,
        )  # fmt: skip
        policies = [ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_ALL]
        layers = FusedLayers(model.get_base_model(), policies, torch.float32, keep_dequantized=True)
        if graphs:
            layers.use_graphs(LayerGraphs(lambda: recorder, lambda: True, Waiting(), Clock()))
        results.append(passes(model))

    assert recorder.launches == 2 * LAYERS * (len(DOCUMENTS) - EAGER_PASSES)
    for one, other in zip(*results, strict=True):
        assert [name for name, value in other.items() if not torch.equal(one[name], value)] == []


# Packs of 13 to 16 tokens in two or three documents, of which the longest has more than 8.
PACKS = [(9, 5), (10, 4, 1), (12, 3), (9, 7), (13, 2), (10, 2, 1)]
PADDED = 1e-5
"""Products of more rows sum in another order (fp32)."""


@pytest.fixture
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording for packs of 13 to 16 tokens."""
    monkeypatch.setattr(pass_shape, "PARTS", 2)


@pytest.mark.usefixtures("in_pytorch", "_coarse")
@pytest.mark.parametrize(("kind", "policy"), CASES[1:4])
def test_packs_of_about_one_size_share_a_recording(kind: str, policy: ActivationPolicy) -> None:
    expected = passes(fused(kind, policy)[0], PACKS)
    model, recorder = recorded(kind, policy)[::2]
    for number, (one, other) in enumerate(zip(passes(model, PACKS), expected, strict=True)):
        assert largest_error(one, other) < PADDED, number
    assert recorder.recordings == 2 * LAYERS
    assert recorder.launches == 2 * LAYERS * (len(PACKS) - EAGER_PASSES)


@pytest.mark.usefixtures("in_pytorch", "_coarse")
def test_packs_in_fp8_share_a_recording() -> None:
    """A row of zeros has no largest value to be scaled by."""
    results = []
    for records in (False, True):
        model, layers = fused("llama", ActivationPolicy.SAVE_ALL)
        assert layers.use_fp8() > 0.8, "but for an MLP of unsuited sizes"
        if records:
            layers.use_graphs(LayerGraphs(RerunRecorder, lambda: True, Waiting(), Clock()))
        results.append(passes(model, PACKS))
    for number, (one, other) in enumerate(zip(*results, strict=True)):
        assert largest_error(one, other) < PADDED, number


@pytest.mark.usefixtures("in_pytorch", "_coarse")
def test_rows_behind_the_last_token_are_zeros_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the pass before would add their gradients."""
    bring, expected = Place.bring, passes(fused("llama", ActivationPolicy.SAVE_ALL)[0], PACKS)

    def keep(self: Place, tensor: torch.Tensor, *, beyond: int = 0) -> None:
        if beyond or len(tensor) == len(self.tensor):
            bring(self, tensor, beyond=beyond)
        else:
            self.tensor[: len(tensor)].copy_(tensor.detach())

    monkeypatch.setattr(Place, "bring", keep)
    found = passes(recorded("llama", ActivationPolicy.SAVE_ALL)[0], PACKS)
    errors = [largest_error(one, other) for one, other in zip(found, expected, strict=True)]
    assert max(errors[:EAGER_PASSES]) < PADDED
    assert not all(error < PADDED for error in errors), "not a number, or more than rounding"


@pytest.mark.usefixtures("in_pytorch")
def test_layers_that_cannot_be_recorded_take_the_tokens_of_a_pass_and_no_more() -> None:
    model, layers, recorder = recorded("llama", ActivationPolicy.SAVE_ALL)
    layers.set_policies([ActivationPolicy.OFFLOAD, ActivationPolicy.SAVE_ALL])
    passes(model, PACKS[: EAGER_PASSES + 1])
    assert recorder.recordings == 0, "no two packs are alike"


def test_layers_whose_weights_or_policies_change_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layers, _ = recorded("llama", ActivationPolicy.SAVE_ALL)
    changes: list[Callable[[], Any]] = [
        lambda: layers.set_policies([ActivationPolicy.RECOMPUTE_ALL] * LAYERS), lambda: layers.keep_weights(0),
        layers.use_fp8, layers.use_compute_dtype,
    ]  # fmt: skip
    forgotten = []
    monkeypatch.setattr(LayerGraphs, "forget", lambda self: forgotten.append(self))
    for number, change in enumerate(changes, 1):
        change()
        assert len(forgotten) == number


def test_layers_that_drop_or_keep_their_inputs_on_the_host_are_not_recorded() -> None:
    model, layers, recorder = recorded("llama", ActivationPolicy.SAVE_ALL)
    layers.set_policies([ActivationPolicy.OFFLOAD, ActivationPolicy.SAVE_ALL])
    passes(model)
    assert recorder.recordings == 2, "the second layer's"

    model, layers, _ = recorded("llama", ActivationPolicy.SAVE_ALL, lora_dropout=0.5)
    assert [layer.is_recordable for layer in layers.layers] == [True, True], "nothing drops in evaluation"
    model.train()
    assert [layer.is_recordable for layer in layers.layers] == [False, False]


def test_graphs_that_are_dropped_are_not_made_again() -> None:
    model, layers, recorder = recorded("llama", ActivationPolicy.SAVE_ALL)
    assert not layers.drop_graphs()
    layers.use_graphs(LayerGraphs(lambda: recorder, lambda: True, Waiting(), Clock()))
    passes(model)
    assert layers.drop_graphs()
    passes(model)
    assert recorder.recordings == 2 * LAYERS
