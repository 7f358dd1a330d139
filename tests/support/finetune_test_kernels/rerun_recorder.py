"""A recorder for machines without a GPU: what it recorded runs again, into the tensors of the first time."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from finetune_kernels.graphs.recorder import Launch, Result


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
