"""A stack of small functions that passes go through as through a model's layers."""

from typing import Any

import torch

from finetune_kernels.graphs.layer_graphs import LayerGraphs, RecordedPass
from finetune_kernels.primitives.attention.inputs import PackedSequences

LAYERS = 3
WIDTH = 4


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

    def __init__(self, graphs: LayerGraphs | None) -> None:
        self.graphs = graphs
        self.weights = [torch.nn.Parameter(torch.linspace(0.5, 1.5, WIDTH) + 0.1 * index) for index in range(LAYERS)]
        self.recorded: RecordedPass | None = None

    def forward(self, number: int, lengths: tuple[int, ...]) -> torch.Tensor:
        """Output of pass `number` through all layers."""
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(sum(lengths), WIDTH, generator=generator)
        shared = torch.rand(sum(lengths), 1, generator=generator)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
        sequences = PackedSequences(ends, max(lengths), sum(lengths))

        self.recorded = None if self.graphs is None else self.graphs.begin(x, sequences)
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
