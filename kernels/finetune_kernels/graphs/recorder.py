"""Records what a function launches on the GPU, and launches it again.

A recorded function does not run: its kernels run when the graph is launched, on the same addresses each time. What it
allocates comes from memory that only graphs of the same recorder use, in the order in which they were recorded; so they
have to be launched in that order, too.

Source: NVIDIA, "CUDA C++ Programming Guide", graphs by stream capture; `torch.cuda.CUDAGraph`.
"""

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch

Result = TypeVar("Result")
Launch = Callable[[], None]


def release_workspaces() -> None:
    """Gives back the memory in which cuBLAS works. It keeps 64 MiB for the stream of a recording, among its graphs'."""
    torch._C._cuda_clearCublasWorkspaces()


class Recorder(Protocol):
    """Records functions that are launched again in the order of their recording."""

    def record(self, run: Callable[[], Result]) -> tuple[Result, Launch]:
        """Returns what `run` returned, whose tensors have no values yet, and a function that computes them."""
        ...


class GraphRecorder:
    """A recorder of CUDA graphs, with memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Result]) -> tuple[Result, Launch]:
        """Records `run` on a stream of its own; see `Recorder`.

        Raises RuntimeError if `run` waits for the GPU, or runs out of memory.
        """
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)

        # A collection may free what belongs to another stream or graph, which a recording forbids.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                result = self._capture(graph, run)
        finally:
            if collects:
                gc.enable()
        current.wait_stream(self._stream)
        return result, graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, run: Callable[[], Result]) -> Result:
        """`run` as a graph. Other threads may go on talking to the GPU: data loaders pin memory meanwhile."""
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            result = run()
        except BaseException:
            with suppress(RuntimeError):  # the recording is spoilt, and says so once more
                graph.capture_end()
            raise
        graph.capture_end()
        return result
