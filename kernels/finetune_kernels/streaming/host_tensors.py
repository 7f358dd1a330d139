"""Frozen tensors that wait in pinned host memory, and are in a place on the GPU while they are used.

    host     layer 0, layer 1, layer 2, ...
    GPU      slot 0: layers 0, 2, 4, ...     slot 1: layers 1, 3, 5, ...

A layer always comes to the same slot, so what autograd saved as a view of a weight in forward shows that weight in
backward. Between two uses the tensors have no storage: who reads them out of turn does not get another layer's bytes.
"""

from collections.abc import Sequence

import torch

from finetune_kernels.primitives.pinned_memory import copy_from_pieces, copy_to_pieces, pinned_pieces
from finetune_kernels.streaming.flat_layout import flat_bytes, move_into, views_in


class Slot:
    """A place for one layer on the GPU, which is filled on a stream of its own."""

    def __init__(self, size: int, device: torch.device, stream: "torch.cuda.Stream | None") -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._stream = stream
        self.holder: HostTensors | None = None

    def fill(self, pieces: Sequence[torch.Tensor]) -> "torch.cuda.Event | None":
        """Begins to copy `pieces`, after everything that has been launched so far, which may still read the slot.
        Returns the event of their arrival; None on a CPU, which copies at once."""
        if self._stream is None:
            self._copy(pieces)
            return None

        self._stream.wait_stream(torch.cuda.current_stream(self.buffer.device))
        with torch.cuda.stream(self._stream):
            self._copy(pieces)
            arrived: torch.cuda.Event = self._stream.record_event()
        return arrived

    def _copy(self, pieces: Sequence[torch.Tensor]) -> None:
        copy_from_pieces(pieces, self.buffer[: sum(piece.numel() for piece in pieces)])


class HostTensors:
    """Takes over the contents of `tensors`, which are on one device: none of them stays there."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.device = tensors[0].device
        whole = torch.empty(flat_bytes(tensors), dtype=torch.uint8, device=self.device)
        self._tensors, self._nowhere = list(tensors), move_into(whole, tensors)

        self._pieces = pinned_pieces(whole.numel(), pinned=whole.is_cuda)
        copy_to_pieces(self._pieces, whole)
        if whole.is_cuda:
            torch.cuda.current_stream(self.device).synchronize()
        whole.untyped_storage().resize_(0)
        self._slot: Slot | None = None
        self._there: list[torch.Tensor] = []
        self._arrived: torch.cuda.Event | None = None

    @property
    def whole_bytes(self) -> int:
        """Bytes that the tensors take in a slot."""
        return self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(piece.numel() for piece in self._pieces)

    @property
    def storage_key(self) -> int:
        """`storage_key` of the tensors while they have no storage."""
        return storage_key(self._nowhere[0])

    def content_of(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the content, on the CPU, of a view of the tensors that has no storage now; its `storage_key` is this
        one's."""
        begin = value.storage_offset() * value.element_size()
        end = begin + value.nbytes
        parts = [
            piece[max(0, begin - at) : max(0, end - at)]
            for at, piece in zip(range(0, end, self._pieces[0].numel()), self._pieces, strict=False)
        ]
        return torch.cat(parts).view(value.dtype).view(value.shape)

    def use_slot(self, slot: Slot) -> None:
        """Gives the tensors their place; they must not be in another one."""
        self._slot, self._there = slot, views_in(slot.buffer, self._tensors)

    def bring(self) -> None:
        """Begins to copy the tensors to the GPU; where another layer still has their place, `wait` does."""
        assert self._slot is not None
        if self._slot.holder is None:
            self._slot.holder = self
            self._arrived = self._slot.fill(self._pieces)

    def wait(self) -> None:
        """Makes what is launched from now on wait until the tensors are there. Raises RuntimeError if another layer has
        their place."""
        self.bring()
        assert self._slot is not None
        if self._slot.holder is not self:
            raise RuntimeError("a layer's place on the GPU is taken: the one before was not released")
        if self._arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived)
            self._arrived = None
        self._point_to(self._there)

    def release(self) -> None:
        """Leaves the place to the next layer, which is copied after what has been launched so far."""
        assert self._slot is not None
        if self._slot.holder is self:
            self._slot.holder, self._arrived = None, None
        self._point_to(self._nowhere)

    def _point_to(self, views: Sequence[torch.Tensor]) -> None:
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.data = view


def storage_key(tensor: torch.Tensor) -> int:
    """A number that all views of one storage have, empty or not, and no other tensor."""
    return int(tensor.untyped_storage()._cdata)
