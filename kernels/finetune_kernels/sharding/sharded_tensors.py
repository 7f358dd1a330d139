"""Frozen tensors of which each rank keeps an equal part of the bytes, and which are whole only while they are used.

    rank            0         1         2         3
    bytes       [ codes of q | scales of q | codes of k | scales of k | ... ]

The tensors lie in one buffer, one after the other, so that one all-gather brings all of them into place. Between two
uses the buffer's storage is empty; the tensors stay the objects that they are, and may not be read then.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
ALIGNMENT = 256
"""Bytes that tensors in the buffer begin at a multiple of: kernels read more at a time from aligned addresses."""


class ShardedTensors:
    """Takes over the contents of `tensors`, which are on one device; keeps the part of `rank` out of `ranks`."""

    def __init__(self, tensors: Sequence[torch.Tensor], rank: int, ranks: int) -> None:
        sizes = [_aligned(tensor.numel() * tensor.element_size(), ALIGNMENT) for tensor in tensors]
        total = _aligned(sum(sizes), ALIGNMENT * ranks)
        self._whole = torch.zeros(total, dtype=torch.uint8, device=tensors[0].device)

        for tensor, part in zip(tensors, torch.split(self._whole, [*sizes, total - sum(sizes)]), strict=False):
            content = part[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            content.copy_(tensor.detach())
            tensor.data = content  # the same object, wherever it is referred to

        size = total // ranks
        self._shard = self._whole[rank * size : (rank + 1) * size].clone()
        self._arriving: dist.Work | None = None
        self._free()

    @property
    def whole_bytes(self) -> int:
        """Bytes of the buffer while the tensors are whole."""
        return self._whole.numel()

    @property
    def shard_bytes(self) -> int:
        """Bytes that this rank keeps."""
        return self._shard.numel()

    def gather(self) -> None:
        """Begins to bring all ranks' parts together. All ranks must call it in the same order, and then `wait`.

        NCCL copies on a stream of its own, after what has been launched on this one and beside what will be.
        """
        self._whole.untyped_storage().resize_(self._whole.numel())
        self._arriving = _all_gather(self._whole, self._shard, async_op=True)

    def wait(self) -> None:
        """Makes what is launched from now on wait until the tensors are whole."""
        if self._arriving is not None:
            self._arriving.wait()
            self._arriving = None

    def release(self) -> None:
        """Frees the buffer, for what is launched from now on; this rank's part stays."""
        self.wait()
        self._free()

    def _free(self) -> None:
        self._whole.untyped_storage().resize_(0)


def _aligned(size: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-size // to) * to
