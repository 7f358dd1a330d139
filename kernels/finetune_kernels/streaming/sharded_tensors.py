"""Frozen tensors of which each rank keeps an equal part of the bytes, and which are whole only while they are used.

    rank            0         1         2         3
    bytes       [ codes of q | scales of q | codes of k | scales of k | ... ]

One all-gather brings all of them into place. Between two uses the buffer's storage is empty; the tensors stay the
objects that they are, and may not be read then.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from finetune_kernels.streaming.flat_layout import ALIGNMENT, aligned, flat_bytes, move_into

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class ShardedTensors:
    """Takes over the contents of `tensors`, which are on one device; keeps the part of `rank` out of `ranks`."""

    def __init__(self, tensors: Sequence[torch.Tensor], rank: int, ranks: int) -> None:
        total = aligned(flat_bytes(tensors), ALIGNMENT * ranks)
        self._whole = torch.zeros(total, dtype=torch.uint8, device=tensors[0].device)
        move_into(self._whole, tensors)

        size = total // ranks
        self._shard = self._whole[rank * size : (rank + 1) * size].clone()
        self._arriving: dist.Work | None = None
        self._free()

    @property
    def whole_bytes(self) -> int:
        """Bytes of the buffer while the tensors are whole."""
        return self._whole.numel()

    @property
    def kept_bytes(self) -> int:
        """Bytes that this rank keeps."""
        return self._shard.numel()

    def bring(self) -> None:
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
