"""Two decoder layers' frozen weights at a time: of the layer that computes, and of the one that comes next.

    forward      0 1 2 ... L-1
    backward     L-1 ... 1 0        not below the first layer with an adapter

While a layer computes, the next one's weights are brought, from the ranks or from host memory, so that nothing waits
for them. Which one that is follows from the order of the layers alone. So every rank issues the same collectives in the
same order, whatever rows it has, as long as all make the same passes; `finish_pass` makes up for a pass that ended
early on one rank. Layers from host memory need nobody: their next pass begins wherever the one before ended.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn


class StreamedTensors(Protocol):
    """One layer's frozen tensors, wherever they come from."""

    @property
    def whole_bytes(self) -> int:
        """Bytes on the GPU while they are whole."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that this process keeps between two uses."""

    def bring(self) -> None:
        """Begins to make them whole, beside what the GPU computes."""

    def wait(self) -> None:
        """Makes what is launched from now on wait until they are whole."""

    def release(self) -> None:
        """Gives up what makes them whole, once what has been launched is done."""


class LayerWindow:
    """The streamed weights of decoder layers, in the order in which the layers compute."""

    def __init__(self) -> None:
        self._layers: list[StreamedTensors] = []
        self._last = -1
        self._at = 0
        """The layer that was used last."""
        self._opened: set[int] = set()
        self._goes_down = False
        self._floor = 0
        """The layer at which backward passes end."""
        self._made = 0
        """Layers that the pass has used so far, those of its backward pass counted again."""
        self.on_forward: Callable[[], None] | None = None
        """Called where the first layer is about to compute, before anything is brought for it."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that this process keeps of all layers."""
        return sum(layer.kept_bytes for layer in self._layers)

    @property
    def window_bytes(self) -> int:
        """Most bytes of whole layers at a time, beside those that this process keeps."""
        return sum(sorted(layer.whole_bytes for layer in self._layers)[-2:])

    def attach(self, layers: Sequence[StreamedTensors], modules: Sequence[nn.Module]) -> None:
        """Has the decoder layers `modules`, which follow those that are here already, use their weights `layers`,
        forward and backward."""
        first = len(self._layers)
        self._layers += layers
        self._last = len(self._layers) - 1
        for index, module in enumerate(modules, first):
            module.register_forward_pre_hook(_UseForward(self, index))
            module.register_forward_hook(_UseBackward(self, index))

    def begin_pass(self) -> None:
        """Begins a pass that `finish_pass` may have to finish."""
        self._made = 0

    @property
    def is_within_pass(self) -> bool:
        """True if a forward pass has begun and not used all layers."""
        return 0 < self._made <= self._last

    def finish_pass(self, *, trains: bool) -> None:
        """Brings what is left of a pass, as the ranks do that compute it. `trains`: it has a backward pass."""
        for index in range(self._made, self._last + 1):
            self.use(index, trains=trains)
        if trains:
            for index in range(2 * self._last - self._made, self._floor - 1, -1):
                self.use(index, trains=True, backward=True)

    def use(self, index: int, *, trains: bool, backward: bool = False) -> None:
        """Makes a layer's weights whole for what is launched from now on, and begins to bring the next one's.

        `trains`: a backward pass is going on or will follow. Raises RuntimeError for a layer out of turn.
        """
        if index and abs(index - self._at) > 1:
            raise RuntimeError(f"layer {index} runs after layer {self._at}: streamed layers have to run in their order")
        moves = index != self._at
        if index == 0 and not backward:
            self._floor = self._at if self._goes_down else self._floor
            self._goes_down = False
        elif moves:
            self._goes_down = index < self._at

        self._open(index, self._next(index, trains=trains))
        # Only now: a layer for which memory ran out is used once more by `finish_pass`.
        self._made += moves or self._made == 0
        self._at = index

    def close(self) -> None:
        """Frees all whole layers, for instance before memory is measured. All ranks do so at once."""
        self._open()

    def _next(self, index: int, *, trains: bool) -> int:
        """The layer that will be used after this one."""
        if index == 0:
            return min(1, self._last)  # which the next forward pass needs, after a backward pass has ended here
        if index == self._last:
            return index - 1 if trains else 0
        return index - 1 if self._goes_down else index + 1

    def _open(self, *wanted: int) -> None:
        """Makes the first of the `wanted` layers whole, begins to bring the others, and frees all that are not."""
        for index in self._opened.difference(wanted):
            self._layers[index].release()
            self._opened.discard(index)

        for index in wanted:
            if index not in self._opened:
                self._layers[index].bring()
                self._opened.add(index)
        for index in wanted[:1]:
            self._layers[index].wait()


class _UseForward:
    """Makes a layer's weights whole before its module runs."""

    def __init__(self, window: LayerWindow, index: int) -> None:
        self._window, self._index = window, index

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if self._index == 0 and self._window.on_forward is not None:
            self._window.on_forward()
        self._window.use(self._index, trains=torch.is_grad_enabled())


class _UseBackward:
    """Makes a layer's weights whole before its backward pass: the first that it computes is the output's gradient."""

    def __init__(self, window: LayerWindow, index: int) -> None:
        self._window, self._index = window, index

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        hidden, *others = output if isinstance(output, tuple) else (output,)
        hidden = _BeforeBackward.apply(hidden, self._window, self._index)  # type: ignore[no-untyped-call]
        return (hidden, *others) if isinstance(output, tuple) else hidden


class _BeforeBackward(torch.autograd.Function):
    """The identity, which uses a layer when its output's gradient is there."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, window: LayerWindow, index: int) -> torch.Tensor:
        """Returns `hidden`."""
        ctx.window, ctx.index = window, index
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Returns `gradient`."""
        ctx.window.use(ctx.index, trains=True, backward=True)
        return gradient, None, None
