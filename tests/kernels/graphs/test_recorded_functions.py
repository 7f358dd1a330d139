"""Passes through a stack of small functions, launched as graphs: right in every pass, given up where they must be."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune_kernels.graphs import layer_graphs
from finetune_kernels.graphs.layer_graphs import EAGER_PASSES, MAX_SHAPES, LayerGraphs
from finetune_kernels.graphs.recorded_function import Place
from finetune_kernels.graphs.recorder import Launch, Recorder, Result
from finetune_test_kernels.rerun_recorder import LAYERS, Clock, RerunRecorder, Stack, Waiting


def new_stack(recorder: Recorder | None = None, *, room: bool = True) -> tuple[Stack, RerunRecorder]:
    """A stack whose passes are recorded by one recorder."""
    chosen: Any = recorder or RerunRecorder()
    return Stack(LayerGraphs(lambda: chosen, lambda: room, Waiting(), Clock())), chosen


def are_same(found: list[list[torch.Tensor]], passes: list[tuple[int, ...]]) -> list[bool]:
    """For each pass whether it is, to the bit, what it is without graphs."""
    expected = Stack(None).train(passes)
    return [all(map(torch.equal, one, other)) for one, other in zip(found, expected, strict=True)]


SAME = [(3, 2), (2, 3), (3, 2), (3, 2), (2, 3), (3, 2), (2, 3)]
"""Passes of one shape: rows, documents and the longest of them."""


def test_every_pass_is_right_to_the_bit_and_recorded_once() -> None:
    stack, recorder = new_stack()
    assert all(are_same(stack.train(SAME), SAME))
    assert recorder.recordings == 2 * LAYERS
    assert recorder.launches == 2 * LAYERS * (len(SAME) - EAGER_PASSES)


@pytest.mark.parametrize("kind", ["input", "gradient", "bounds", "shared"])
def test_what_is_not_brought_to_its_address_is_missed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bring, stack = Place.bring, new_stack()[0]

    def forgetful(self: Place, tensor: torch.Tensor, *, beyond: int = 0) -> None:
        ours = stack.recorded or next(iter(stack.graphs._recorded.values()))  # type: ignore[union-attr]
        layers = list(ours.layers.values())
        of_kind = {
            "input": [layer._x for layer in layers[:1]], "gradient": [layer._dy for layer in layers[-1:]],
            "bounds": [ours._ends], "shared": [place for places in ours._shared for place in places],
        }  # fmt: skip
        is_first = sum(layer.passes for layer in layers[-1:]) <= 1
        if is_first or not any(self is place for place in of_kind[kind]):
            bring(self, tensor, beyond=beyond)

    monkeypatch.setattr(Place, "bring", forgetful)
    right = are_same(stack.train(SAME), SAME)
    assert all(right[: EAGER_PASSES + 1])
    assert not all(right[EAGER_PASSES + 1 :])


def test_outputs_that_are_there_already_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, copy = [0], torch.Tensor.copy_
    stack, _ = new_stack()
    stack.train(SAME[:5])

    def counted(self: torch.Tensor, *values: Any, **options: Any) -> torch.Tensor:
        copies[0] += 1
        return copy(self, *values, **options)

    recorded = next(iter(stack.graphs._recorded.values()))  # type: ignore[union-attr]
    for layer in recorded.layers.values():
        layer._forward = layer._backward = lambda: None
    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    stack.forward(9, SAME[0]).sum().backward()
    assert copies[0] == 4, "the bounds, what layers share, the first layer's input and the last one's gradient"


def test_passes_of_other_shapes_and_without_gradients_run_beside_recorded_ones() -> None:
    stack, recorder = new_stack()
    mixed = [*SAME[:5], (1, 4), SAME[5], (5,), (4,), SAME[6]]
    assert all(are_same(stack.train(mixed), mixed))
    assert recorder.recordings == 2 * LAYERS
    with torch.no_grad():
        stack.forward(0, SAME[0])
    assert stack.recorded is None


def test_a_few_shapes_are_recorded_and_no_more() -> None:
    stack, recorder = new_stack()
    shapes = [(size, 1) for size in range(2, 4 + MAX_SHAPES)]
    passes = [shape for shape in shapes for _ in range(EAGER_PASSES + 1)]
    assert all(are_same(stack.train(passes), passes))
    assert recorder.recordings == 2 * LAYERS * MAX_SHAPES


def test_shapes_that_never_come_again_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_graphs, "MAX_COUNTED", 8)
    stack, recorder = new_stack()
    stack.train(SAME)
    launches = recorder.launches
    stack.train([(size, 1) for size in range(6, 40)])
    assert stack.graphs is not None
    assert len(stack.graphs._seen) <= 8
    stack.train(SAME[:2])
    assert recorder.launches == launches + 4 * LAYERS, "what is recorded stays"


def test_nothing_is_recorded_without_room() -> None:
    stack, recorder = new_stack(room=False)
    assert all(are_same(stack.train(SAME), SAME))
    assert recorder.recordings == 0
    assert stack.graphs is not None
    assert not stack.graphs.has_some


def test_a_weight_that_moved_and_recordings_that_are_forgotten_are_recorded_anew() -> None:
    stack, recorder = new_stack()
    stack.train(SAME)
    stack.weights[1].data = stack.weights[1].data.clone()
    stack.train(SAME)
    assert recorder.recordings == 4 * LAYERS
    assert stack.graphs is not None
    stack.graphs.forget()
    stack.train(SAME)
    assert recorder.recordings == 6 * LAYERS


def test_a_second_forward_pass_before_backward_is_an_error() -> None:
    stack, _ = new_stack()
    stack.train(SAME)
    first, _ = stack.forward(0, SAME[0]), stack.forward(1, SAME[0])
    with pytest.raises(RuntimeError, match="ran forward again"):
        first.sum().backward()


class Failing(RerunRecorder):
    """Fails from one of its recordings on."""

    def __init__(self, number: int, error: Exception) -> None:
        super().__init__()
        self._number, self._error = number, error

    def record(self, run: Callable[[], Result]) -> tuple[Result, Launch]:
        """See `RerunRecorder`."""
        if self.recordings == self._number:
            raise self._error
        return super().record(run)


@pytest.mark.parametrize("number", range(2 * LAYERS))
def test_where_recording_fails_the_pass_ends_well_and_no_other_is_recorded(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    stack, recorder = new_stack(Failing(number, RuntimeError("operation not permitted when stream is capturing")))
    with caplog.at_level(logging.WARNING, layer_graphs.__name__):
        assert all(are_same(stack.train(SAME), SAME))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("layers are launched kernel by kernel, as they cannot be recorded: operation not permit")
    assert recorder.recordings == number


def test_memory_that_runs_out_while_recording_is_not_swallowed() -> None:
    stack, _ = new_stack(Failing(LAYERS, torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        stack.train(SAME)
