"""An autograd function whose forward and backward are recorded once and launched from then on.

The function's own `forward` and `backward` are what is recorded, with a stand-in for autograd's context: what they save
for each other stays in the graphs' memory. Tensors that come from outside are copied to the addresses of the recording,
unless they are there already, as the output of the layer before is.
"""

from collections.abc import Sequence
from typing import Any

import torch

from finetune_kernels.graphs.recorder import Launch, Recorder


class Context:
    """Stands in for autograd's context: keeps what forward saves for backward."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[torch.Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keeps `tensors` until backward has been recorded."""
        self.saved_tensors = tensors


class Place:
    """An address to which a tensor of every pass comes."""

    def __init__(self, first: torch.Tensor, *, stays: bool, rows: int | None = None) -> None:
        """`stays`: tensors come to the address of `first` by themselves, at most passes. `rows`: of the place, if
        tensors may have fewer."""
        self.tensor = first.detach()
        if not stays:
            self.tensor = first.new_empty((first.shape[0] if rows is None else rows, *first.shape[1:]))

    def bring(self, tensor: torch.Tensor, *, beyond: int = 0) -> None:
        """Copies a tensor of the same type here, if it is elsewhere; rows that it does not have become `beyond`."""
        if tensor.data_ptr() != self.tensor.data_ptr():
            count = tensor.shape[0]
            self.tensor[:count].copy_(tensor.detach())
            if count < self.tensor.shape[0]:
                self.tensor[count:].fill_(beyond)


class Outputs:
    """The tensors that recorded functions write; what reads them needs no copy."""

    def __init__(self, rows: int) -> None:
        """`rows`: of every input and output."""
        self._rows = rows
        self._kept: dict[int, torch.Tensor] = {}

    def add(self, tensor: torch.Tensor | None) -> None:
        """Remembers an output."""
        if tensor is not None:
            self._kept[tensor.data_ptr()] = tensor

    def place(self, tensor: torch.Tensor) -> Place:
        """Returns the place to which tensors like this one come, which may be the first rows of an output."""
        kept = self._kept.get(tensor.data_ptr())
        return Place(tensor, stays=False, rows=self._rows) if kept is None else Place(kept, stays=True)


class RecordedFunction:
    """One call of an autograd function, recorded at the first pass: `function(x, *others, *parameters)`."""

    def __init__(
        self, function: Any, others: Sequence[Any], parameters: Sequence[torch.nn.Parameter], recorder: Recorder,
        outputs: Outputs,
    ) -> None:  # fmt: skip
        """`others` and `parameters` stay where they are; others get no gradient."""
        self._function, self._others, self.parameters = function, tuple(others), tuple(parameters)
        self._recorder, self._outputs = recorder, outputs
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]

        self._x: Place | None = None
        self._dy: Place | None = None
        self._y: torch.Tensor
        self._gradients: tuple[torch.Tensor | None, ...]
        self._forward: Launch | None = None
        self._backward: Launch | None = None
        self._context: Context
        self.passes = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x -> y, with gradients of x and of the parameters; x may have fewer rows than the recording."""
        return _Launched.apply(x, self, *self.parameters)  # type: ignore[no-untyped-call, no-any-return]

    @property
    def has_moved(self) -> bool:
        """True if a parameter is no longer where it was when the function was recorded."""
        return [parameter.data_ptr() for parameter in self.parameters] != self._addresses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns y, at the same address in every pass."""
        self.passes += 1
        if self._x is None:
            self._x = self._outputs.place(x)
            trains = (False,) * len(self._others) + (True,) * len(self.parameters)
            self._context = Context((x.requires_grad, *trains))
        self._x.bring(x)

        if self._forward is None:
            arguments = (self._x.tensor, *self._others, *self.parameters)
            self._y, self._forward = self._recorder.record(lambda: self._function.forward(self._context, *arguments))
            self._outputs.add(self._y)
        self._forward()
        return self._y[: x.shape[0]].detach()

    def backward(self, dy: torch.Tensor, number: int) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of x and of the parameters; `number`: `passes` as of the forward pass.

        Raises RuntimeError if another forward pass came between: its tensors are where this one's were.
        """
        if number != self.passes:
            raise RuntimeError("a recorded layer ran forward again before its backward pass")
        if self._dy is None:
            self._dy = self._outputs.place(dy)
        self._dy.bring(dy)
        if self._backward is None:
            self._record_backward(self._dy.tensor)
        else:
            self._backward()
        dx, *others = self._gradients
        return None if dx is None else dx[: dy.shape[0]], *others

    def _record_backward(self, dy: torch.Tensor) -> None:
        """Records the backward pass of dy, and launches it."""
        found, self._backward = self._recorder.record(lambda: self._function.backward(self._context, dy))
        self._gradients = (found[0], *found[1 + len(self._others) :])
        self._outputs.add(found[0])
        self._backward()
        self._context.saved_tensors = ()  # the memory is for the next recording, which comes later in every pass


class _Launched(torch.autograd.Function):
    """Autograd around a recorded function."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, recorded: RecordedFunction, *_: torch.nn.Parameter) -> torch.Tensor:
        """See `RecordedFunction.forward`."""
        y = recorded.forward(x)
        ctx.recorded, ctx.number = recorded, recorded.passes
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """See `RecordedFunction.backward`."""
        dx, *gradients = ctx.recorded.backward(dy, ctx.number)
        return dx, None, *gradients
