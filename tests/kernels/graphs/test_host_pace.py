"""Whether the GPU waits for the host, by what it has done of a pass when the last layer is launched."""

import pytest

from finetune_kernels.graphs.host_pace import LAG, HostPace
from finetune_kernels.graphs.layer_graphs import EAGER_PASSES, WAITING_PASSES, LayerGraphs
from finetune_test_kernels.rerun_recorder import Clock, RerunRecorder, Stack, Waiting


class Gpu:
    """A GPU that is some layers behind its host."""

    def __init__(self, behind: int) -> None:
        self.behind, self.launched = behind, 0

    def event(self) -> "Gpu.Place":
        """A place in its work."""
        return Gpu.Place(self)

    class Place:
        """See `host_pace.Event`."""

        def __init__(self, gpu: "Gpu") -> None:
            self._gpu = gpu

        def record(self) -> None:
            """Takes the place behind what has been launched."""
            self._at = self._gpu.launched

        def query(self) -> bool:
            """True if the GPU has come past it."""
            return self._gpu.launched - self._gpu.behind >= self._at


def run_pass(gpu: Gpu, pace: HostPace, layers: int) -> bool:
    """Launches a pass; returns what the pace says of it."""
    for left in reversed(range(layers)):
        gpu.launched += 1
        pace.launched(left)
    return pace.gpu_waits


@pytest.mark.parametrize(("behind", "waits"), [(0, True), (1, True), (LAG, True), (LAG + 1, False), (20, False)])
def test_a_gpu_that_is_close_behind_waits(behind: int, waits: bool) -> None:
    gpu = Gpu(behind)
    assert run_pass(gpu, HostPace(gpu.event), 24) is waits


def test_every_pass_is_judged_by_itself_and_too_few_layers_tell_nothing() -> None:
    gpu = Gpu(0)
    pace = HostPace(gpu.event)
    assert run_pass(gpu, pace, 24)
    gpu.behind = 10
    assert not run_pass(gpu, pace, 24)
    gpu.behind = 0
    assert run_pass(gpu, pace, LAG + 1)
    assert not run_pass(gpu, pace, LAG)


def test_passes_are_recorded_once_the_gpu_has_waited_in_some_one_after_the_other() -> None:
    recorder, pace = RerunRecorder(), Waiting(waits=False)
    stack, sizes = Stack(LayerGraphs(lambda: recorder, lambda: True, pace, Clock())), [(4, 2)]
    stack.train(sizes * (EAGER_PASSES + 3))
    assert recorder.recordings == 0, "a GPU that is the slower one"

    pace.waits = True
    stack.train(sizes * (WAITING_PASSES - 1))
    pace.waits = False
    stack.train(sizes * 2)
    assert recorder.recordings == 0, "it has caught up in between"

    pace.waits = True
    stack.train(sizes * (WAITING_PASSES + 1))
    assert recorder.recordings > 0


def test_recorded_layers_are_not_watched() -> None:
    """Their pace would be that of graphs."""
    pace = Waiting()
    graphs = LayerGraphs(RerunRecorder, lambda: True, pace, Clock())
    stack = Stack(graphs)
    stack.train([(4, 2)] * (EAGER_PASSES + 1))
    assert graphs.has_some
    seen: list[int] = []
    pace.launched = seen.append  # type: ignore[method-assign]
    graphs.launched(0)
    assert seen == []
