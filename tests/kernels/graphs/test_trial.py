"""Graphs that turn out no faster are given up, by the times that the GPU's clock tells."""

import logging

import pytest
import torch

from finetune_kernels.graphs import layer_graphs
from finetune_kernels.graphs.layer_graphs import EAGER_PASSES, LayerGraphs
from finetune_kernels.graphs.pass_shape import PassShape
from finetune_kernels.graphs.trial import PASSES, GpuPassTimes, TimedEvent, TimedPass, Trial
from finetune_kernels.primitives.attention.inputs import PackedSequences
from finetune_test_kernels.rerun_recorder import LAYERS, Clock, RerunRecorder, Stack, Waiting

SHAPE = PassShape(8, 2, 4, trains_input=False)
SAME = [(3, 2)] * (EAGER_PASSES + PASSES + 4)


def trial(kernels: list[float], graphs: list[float]) -> Trial:
    """A trial with these times a token."""
    found = Trial()
    for times, is_recorded in ((kernels, False), (graphs, True)):
        for milliseconds in times:
            found.note(TimedPass(SHAPE, is_recorded, milliseconds))
    return found


def test_the_median_of_graphs_is_compared_with_the_quickest_kernel_by_kernel() -> None:
    found = trial([3.0, 2.0, 4.0], [1.0] * 3 + [9.0] * 2)
    assert found.gain == 2
    assert not found.is_lost
    assert trial([3.0, 0.9, 4.0], [1.0] * 5).is_lost


def test_the_last_passes_are_compared_and_later_ones_change_nothing() -> None:
    found = trial([1.0, *[4.0] * PASSES], [2.0] * PASSES)
    assert found.gain == 2, "the first pass is forgotten"
    found.note(TimedPass(SHAPE, True, 99.0))
    found.note(TimedPass(SHAPE, False, 0.1))
    assert found.gain == 2


def test_too_few_passes_decide_nothing_and_a_shape_that_only_ran_as_graphs_keeps_them() -> None:
    found = trial([1.0], [2.0] * (PASSES - 1))
    assert not found.is_lost
    with pytest.raises(ValueError, match="too few"):
        _ = found.gain
    assert not trial([], [2.0] * PASSES).is_lost


@pytest.mark.parametrize(("as_graphs", "stays"), [(0.9, True), (1.1, False)])
def test_slower_graphs_are_given_up_and_not_made_again(
    as_graphs: float, stays: bool, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = RerunRecorder()
    stack = Stack(LayerGraphs(lambda: recorder, lambda: True, Waiting(), Clock(as_graphs)))
    with caplog.at_level(logging.INFO, layer_graphs.__name__):
        found = stack.train(SAME)

    expected = Stack(None).train(SAME)
    assert all(one.equal(other) for pair in zip(found, expected, strict=True) for one, other in zip(*pair, strict=True))
    assert stack.graphs is not None
    assert stack.graphs.has_some is stays
    assert recorder.recordings == 2 * LAYERS
    # The first of them is recorded, so its time tells nothing; the verdict comes with the pass behind the last.
    launched = len(SAME) - EAGER_PASSES if stays else PASSES + 1
    assert recorder.launches == 2 * LAYERS * launched
    assert [record.getMessage() for record in caplog.records][1:] == (
        [f"passes of 5 tokens are {1 / as_graphs:.2f} times as fast as graphs"]
        + ([] if stays else ["so they are launched kernel by kernel again"])
    )


def test_one_shape_is_given_up_and_the_other_stays() -> None:
    class Mixed(Clock):
        def begin(self, shape: PassShape, tokens: int, *, is_recorded: bool) -> None:
            self.as_graphs = 1.1 if tokens == 5 else 0.9
            super().begin(shape, tokens, is_recorded=is_recorded)

    recorder = RerunRecorder()
    stack = Stack(LayerGraphs(lambda: recorder, lambda: True, Waiting(), Mixed()))
    stack.train([(3, 2), (4, 2)] * len(SAME))
    assert [shape.rows for shape in stack.graphs._recorded] == [6]  # type: ignore[union-attr]


def test_a_pass_that_broke_off_is_not_ended_by_one_of_evaluation() -> None:
    clock = Clock()
    graphs = LayerGraphs(RerunRecorder, lambda: True, Waiting(), clock)
    stack = Stack(graphs)
    stack.train(SAME[:1])
    list(clock.done())
    ends, x = torch.tensor([0, 3, 5], dtype=torch.int32), torch.zeros(5, 4)
    assert graphs.begin(x, PackedSequences(ends, 3, 5)) is None, "and an error follows"
    with torch.no_grad():
        stack.forward(9, SAME[0])
    assert list(clock.done()) == []
    stack.train(SAME[:1])
    assert len(clock.done()) == 1, "the control"


def test_what_the_layers_launch_changes_and_the_trial_begins_anew() -> None:
    recorder = RerunRecorder()
    stack = Stack(LayerGraphs(lambda: recorder, lambda: True, Waiting(), Clock(1.1)))
    stack.train(SAME)
    assert stack.graphs is not None
    assert not stack.graphs.has_some
    stack.graphs.forget()
    stack.train(SAME[: EAGER_PASSES + 1])
    assert stack.graphs.has_some


class Gpu:
    """A GPU that has done its work up to `now`, in milliseconds."""

    def __init__(self) -> None:
        self.launched, self.now = 0.0, 0.0

    def event(self) -> "Gpu.Place":
        """A place in its work."""
        return Gpu.Place(self)

    class Place:
        """See `TimedEvent`."""

        def __init__(self, gpu: "Gpu") -> None:
            self._gpu, self.at = gpu, -1.0

        def record(self) -> None:
            """Takes the place behind what has been launched."""
            self.at = self._gpu.launched

        def query(self) -> bool:
            """True if the GPU has come past it."""
            return self._gpu.now >= self.at

        def elapsed_time(self, end: TimedEvent) -> float:
            """Milliseconds to `end`."""
            assert isinstance(end, Gpu.Place)
            assert self.query()
            assert end.query()
            return end.at - self.at


def test_times_are_told_once_the_gpu_is_there_and_each_once() -> None:
    gpu = Gpu()
    times = GpuPassTimes(gpu.event)
    for number, is_recorded in enumerate((False, True)):
        times.begin(SHAPE, 4, is_recorded=is_recorded)
        gpu.launched += 8 + number
        times.end()
        gpu.launched += 100  # backward
    assert list(times.done()) == []

    gpu.now = 8
    assert list(times.done()) == [TimedPass(SHAPE, False, 2.0)]
    assert list(times.done()) == []
    gpu.now = 500
    assert list(times.done()) == [TimedPass(SHAPE, True, 2.25)]


def test_a_pass_that_did_not_end_and_forgotten_ones_are_not_told() -> None:
    gpu = Gpu()
    times = GpuPassTimes(gpu.event)
    times.begin(SHAPE, 4, is_recorded=False)
    gpu.launched += 50  # an error
    times.begin(SHAPE, 4, is_recorded=False)
    gpu.launched += 4
    times.end()
    gpu.now = gpu.launched
    assert [took.milliseconds for took in times.done()] == [1.0]

    times.begin(SHAPE, 4, is_recorded=False)
    times.end()
    times.forget()
    assert list(times.done()) == []
