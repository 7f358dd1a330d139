"""Graphs for machines without a GPU: a recorder whose recordings run again, into the tensors of the first time, and a
stack of small functions that passes go through as through a model's layers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from finetune_kernels.graphs.layer_graphs import LayerGraphs, RecordedPass
from finetune_kernels.graphs.pass_shape import PassShape
from finetune_kernels.graphs.recorder import Launch, Result
from finetune_kernels.graphs.trial import TimedPass
from finetune_kernels.primitives.attention.inputs import PackedSequences

LAYERS = 3
WIDTH = 4


def tensors_in(found: Any) -> Iterator[torch.Tensor]:
    """Every tensor of nested tuples and lists."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for part in found:
            yield from tensors_in(part)


class RerunRecorder:
    """Has what makes a graph hard: results come to the addresses of the recording, and only once it is launched."""

    def __init__(self) -> None:
        self.recordings = 0
        self.launches = 0

    def record(self, run: Callable[[], Result]) -> tuple[Result, Launch]:
        """Returns what `run` returned, without its values, and a function that brings these."""
        self.recordings += 1
        result = run()
        for tensor in tensors_in(result):
            tensor.detach().fill_(torch.nan if tensor.is_floating_point() else 0)

        def launch() -> None:
            self.launches += 1
            for target, value in zip(tensors_in(result), tensors_in(run()), strict=True):
                target.detach().copy_(value.detach())

        return result, launch


class Waiting:
    """A pace that says of every pass whether its GPU waits for the host, once its last layer is launched."""

    def __init__(self, *, waits: bool = True) -> None:
        self.waits, self.gpu_waits = waits, False

    def launched(self, left: int) -> None:
        """See `Pace`."""
        if left == 0:
            self.gpu_waits = self.waits


class Clock:
    """Times of passes as a GPU would tell them: a millisecond a token, and `as_graphs` for recorded passes."""

    def __init__(self, as_graphs: float = 0.5) -> None:
        self.as_graphs = as_graphs
        self._begun: TimedPass
        self._ended: list[TimedPass] = []

    def begin(self, shape: PassShape, tokens: int, *, is_recorded: bool) -> None:
        """See `PassTimes`."""
        assert 0 < tokens <= shape.rows
        self._begun = TimedPass(shape, is_recorded, self.as_graphs if is_recorded else 1.0)

    def end(self) -> None:
        """See `PassTimes`."""
        self._ended.append(self._begun)

    def forget(self) -> None:
        """See `PassTimes`."""
        self._ended.clear()

    def done(self) -> list[TimedPass]:
        """See `PassTimes`."""
        found, self._ended = self._ended, []
        return found


class Layer(torch.autograd.Function):
    """y = tanh(w x) * shared, with the rows of the first document doubled."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, shared: torch.Tensor, sequences: PackedSequences, w: torch.Tensor
    ) -> torch.Tensor:
        bend = torch.tanh(w * x)
        factor = shared * torch.where(torch.arange(len(x))[:, None] < sequences.cu_seqlens[1], 2.0, 1.0)
        ctx.save_for_backward(x, w, bend, factor)
        return bend * factor

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, bend, factor = ctx.saved_tensors
        d = dy * factor * (1 - bend * bend)
        return (d * w if ctx.needs_input_grad[0] else None), None, None, (d * x).sum(0)


class Stack:
    """Runs its layers as `FusedLayers` does."""

    def __init__(self, graphs: LayerGraphs | None, *, pads: bool = False) -> None:
        self.graphs, self.pads = graphs, pads
        self.weights = [torch.nn.Parameter(torch.linspace(0.5, 1.5, WIDTH) + 0.1 * index) for index in range(LAYERS)]
        self.recorded: RecordedPass | None = None

    def forward(self, number: int, lengths: tuple[int, ...]) -> torch.Tensor:
        """Output of pass `number` through all layers."""
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(sum(lengths), WIDTH, generator=generator)
        shared = torch.rand(sum(lengths), 1, generator=generator)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
        sequences = PackedSequences(ends, max(lengths), sum(lengths))

        self.recorded = None if self.graphs is None else self.graphs.begin(x, sequences, pads=self.pads)
        if self.recorded is None:
            for index, w in enumerate(self.weights):
                x = Layer.apply(x, shared, sequences, w)  # type: ignore[no-untyped-call]
                if self.graphs is not None:
                    self.graphs.launched(LAYERS - 1 - index)
            return x
        others = (*self.recorded.share(0, (shared,)), self.recorded.sequences)
        for index, w in enumerate(self.weights):
            if index not in self.recorded.layers:
                self.recorded.add(index, Layer, others, [w])
            x = self.recorded.layers[index](x)
            self.graphs.launched(LAYERS - 1 - index)  # type: ignore[union-attr]
        return x

    def train(self, passes: list[tuple[int, ...]]) -> list[list[torch.Tensor]]:
        """Output and gradients of each pass; the weights change between them."""
        found = []
        for number, lengths in enumerate(passes):
            y = self.forward(number, lengths)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(number))
            found.append([y.detach().clone(), *(d.clone() for d in torch.autograd.grad(y, self.weights, dy))])
            with torch.no_grad():
                for w in self.weights:
                    w.mul_(0.9)
        return found
