"""A pass goes to cuDNN's batches once its shape has come before; all calls of attention in a pass agree, in both
directions and where layers run again. cuDNN itself is not here: what it would take is noted, and the CPU's kernel
computes."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from finetune_kernels.graphs.layer_graphs import EAGER_PASSES, LayerGraphs
from finetune_kernels.layers import packed_attention
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.ops import attention
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.primitives.attention import batched, cudnn_cards
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.attention.pass_counts import PASSES, PassCounts, PassesByEnds
from finetune_test_kernels.rerun_recorder import Clock, RerunRecorder, Waiting
from finetune_test_kernels.small_layers import one_pass, small_model

LAYERS = 2
LENGTH = 6
EXPECTED = [number >= PASSES for number in range(1, PASSES + 3)]
"""By pass of one shape: whether cuDNN takes it."""


def packed(*lengths: int) -> PackedSequences:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSequences(ends, max(lengths), sum(lengths))


def test_a_shape_comes_again_from_its_third_pass_on() -> None:
    counts = PassCounts()
    assert not counts.begin(packed(5, 5)).comes_again
    assert [counts.begin(packed(LENGTH)).comes_again for _ in EXPECTED] == EXPECTED == [False, False, True, True, True]
    assert [counts.begin(packed(5, 5)).comes_again for _ in range(2)] == [False, True], "each shape has its own count"
    assert not counts.begin(packed(LENGTH, LENGTH)).comes_again


def test_hundreds_of_shapes_that_come_again_all_count() -> None:
    counts = PassCounts()
    for _ in range(PASSES):
        found = [counts.begin(packed(length)).comes_again for length in range(1, 500)]
    assert all(found)


def test_sequences_of_mixed_lengths_are_not_counted() -> None:
    counts = PassCounts()
    assert not any(counts.begin(packed(5, 6)).comes_again for _ in range(2 * PASSES))
    assert not counts._passes


def test_passes_without_gradients_take_the_kernel_that_training_has_earned() -> None:
    """A trainer compares passes before it trains: two kernels would differ by their rounding."""
    counts = PassCounts()
    with torch.no_grad():
        assert not any(counts.begin(packed(LENGTH)).comes_again for _ in range(2 * PASSES))
    assert [counts.begin(packed(LENGTH)).comes_again for _ in EXPECTED] == EXPECTED
    with torch.no_grad():
        assert counts.begin(packed(LENGTH)).comes_again


def test_the_same_ends_are_the_same_pass_and_are_not_kept() -> None:
    passes, old = PassesByEnds(), packed(LENGTH)
    assert not passes.of(old.cu_seqlens, old).comes_again
    for expected in EXPECTED[1:]:
        sequences = packed(LENGTH)
        assert {passes.of(sequences.cu_seqlens, sequences).comes_again for _ in range(2 * LAYERS)} == {expected}
    assert not passes.of(old.cu_seqlens, old).comes_again, "a backward pass that comes late"

    del old, sequences
    gc.collect()
    assert len(passes._begun) == 0


class Calls:
    """What each call of attention in a pass was told, and what it would be told if each call counted as a pass."""

    def __init__(self) -> None:
        self.told: list[bool] = []
        self.counted: list[bool] = []
        self._counts = PassCounts()

    def note(self, qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> None:
        """Takes note of a call of one direction."""
        self.told.append(batched.takes(qkv.q, sequences, params))
        with torch.enable_grad():  # a layer's function runs without
            self.counted.append(self._counts.begin(sequences).comes_again)

    def by_pass(self, run: Callable[[], Any]) -> Iterator[list[bool]]:
        """What the calls of each pass were told; `run` makes a pass."""
        for _ in EXPECTED:
            self.told.clear()
            run()
            yield list(self.told)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of attention on a card where cuDNN is the faster one."""
    found, choose = Calls(), attention._backend

    def noted(*inputs: Any) -> Any:
        found.note(*inputs)
        return choose(*inputs)

    monkeypatch.setattr(attention, "_backend", noted)
    monkeypatch.setattr(cudnn_cards, "is_faster", lambda device: True)
    return found


def test_fused_layers_agree_in_both_directions(calls: Calls) -> None:
    model = small_model("llama", torch.float32, layers=LAYERS)
    policies = [ActivationPolicy.RECOMPUTE_ALL, ActivationPolicy.SAVE_ALL]
    FusedLayers(model.get_base_model(), policies, torch.float32, keep_dequantized=True)

    told = list(calls.by_pass(lambda: one_pass(model, LENGTH)))
    assert told == [[expected] * 5 for expected in EXPECTED], "two forward, one again, two backward"
    assert calls.counted[:5] == [False, False, True, True, True], "calls that count by themselves disagree in a pass"


def test_a_recording_has_the_kernel_of_the_pass_before_it(calls: Calls) -> None:
    assert PASSES <= EAGER_PASSES, "what is recorded has been compiled"
    model, recorder = small_model("llama", torch.float32, layers=LAYERS), RerunRecorder()
    policies = [ActivationPolicy.SAVE_ALL] * LAYERS
    layers = FusedLayers(model.get_base_model(), policies, torch.float32, keep_dequantized=True)
    layers.use_graphs(LayerGraphs(lambda: recorder, lambda: True, Waiting(), Clock()))

    told = list(calls.by_pass(lambda: one_pass(model, LENGTH)))
    assert [set(each) for each in told] == [{expected} for expected in EXPECTED]
    assert recorder.recordings == 2 * LAYERS
    assert recorder.launches == 2 * LAYERS * (len(EXPECTED) - EAGER_PASSES)


def bounded_pass(model: Any) -> None:
    """One pass of transformers' own layers, forward and backward, each layer run again for backward."""
    ends, tokens = packed(LENGTH).cu_seqlens, torch.arange(3, 3 + LENGTH)[None]
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": LENGTH, "max_length_k": LENGTH}
    model(input_ids=tokens, position_ids=tokens - 3, use_cache=False, **bounds).logits.sum().backward()


@pytest.fixture
def checkpointed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of transformers' layers with packed attention, whose activations are not kept."""
    model = small_model("llama", torch.float32, layers=LAYERS).train()
    assert packed_attention.use_packed_attention(model.get_base_model()) is None
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    monkeypatch.setattr(packed_attention, "_passes", PassesByEnds())
    return model


def test_layers_that_are_called_one_by_one_agree_in_both_directions(calls: Calls, checkpointed: Any) -> None:
    told = list(calls.by_pass(lambda: bounded_pass(checkpointed)))
    assert told == [[expected] * 3 * LAYERS for expected in EXPECTED]


def test_layers_that_count_by_themselves_disagree(
    calls: Calls, checkpointed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PassesByEnds, "of", lambda self, ends, sequences: self._counts.begin(sequences))
    told = list(calls.by_pass(lambda: bounded_pass(checkpointed)))
    assert set(told[0]) == {False, True}
