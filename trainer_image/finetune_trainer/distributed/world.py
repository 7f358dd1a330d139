"""This process among those of the run: its rank, and sums, broadcasts and comparisons over all of them.

Every method is called by all processes in the same order, and waits for the others.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError

Value = TypeVar("Value")
ANOTHER_RANK = "another rank of the run"
"""Cause of a stop that a rank learns of from the others."""


@dataclass(frozen=True)
class World:
    """One of `size` processes that train one adapter, over torch.distributed's default group."""

    rank: int = 0
    size: int = 1
    nodes: int = 1
    """Nodes that the processes are on, with equal numbers of them; rank 0 is on the first."""

    @property
    def is_alone(self) -> bool:
        """True in a run of one process: nothing is exchanged then."""
        return self.size == 1

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Replaces `values` by their sum over all processes; returns them."""
        if not self.is_alone:
            dist.all_reduce(values)
        return values

    def sum_numbers(self, *numbers: float, device: torch.device) -> list[float]:
        """Returns each number's sum over all processes, added in fp64."""
        if self.is_alone:
            return list(numbers)
        return self.sum_(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()

    def gather_numbers(self, *numbers: float) -> list[list[float]]:
        """Returns the numbers of every process, by rank; over the CPU, so that nobody waits for a GPU."""
        own = torch.tensor(numbers, dtype=torch.float64)  # [n]
        if self.is_alone:
            return [own.tolist()]
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        return [each.tolist() for each in every]

    def copy_object(self, value: Value | None, source: int = 0) -> Value:
        """Returns the value of rank `source` on every rank; those of the others do not count. It is pickled: data of
        the run."""
        values = [value]
        if not self.is_alone:
            dist.broadcast_object_list(values, src=source, device=torch.device("cpu"))
        return values[0]  # type: ignore[return-value]

    def gather_objects(self, value: Value) -> list[Value]:
        """Returns the value of every process, by rank, as `copy_object` does."""
        return [self.copy_object(value, source) for source in range(self.size)]

    def copy_folder(self, folder: Path | None, parent: Path) -> Path | None:
        """Returns the path of rank 0's folder, or of this rank's copy of it, below `parent`; None if rank 0 has none.
        Ranks on rank 0's node share its disk."""
        found = self.copy_object(folder)
        if found is None or self.nodes == 1:
            return found

        files = None
        if folder is not None:
            files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        files = self.copy_object(files)
        if self.rank < self.size // self.nodes:
            return found

        for name, content in files.items():
            (parent / found.name / name).parent.mkdir(parents=True, exist_ok=True)
            (parent / found.name / name).write_bytes(content)
        return parent / found.name

    @torch.no_grad()
    def copy_from_first_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives every tensor the values that rank 0 has in it."""
        if not self.is_alone:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    @torch.no_grad()
    def check_equal(self, what: str, tensors: Iterable[torch.Tensor]) -> None:
        """Raises TrainerError (InternalError), on every rank, if a tensor is not the same on all of them to the bit."""
        if self.is_alone:
            return

        sums = torch.stack([_checksum(tensor) for tensor in tensors])  # [N]
        lowest, highest = sums.clone(), sums.clone()
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)

        if different := int((lowest != highest).sum()):
            message = (
                f"{different} of {len(sums)} tensors of {what} differ between the run's {self.size} processes, which "
                "must agree to the bit: no result is written. Please report this with the log; gpus: 1 avoids it"
            )
            raise TrainerError(FailureReason.INTERNAL_ERROR, message)


ALONE = World()
"""The only process of a run."""


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Returns an int64 scalar of the tensor's bytes, which another value or another order changes."""
    values = tensor.detach().contiguous().view(torch.uint8).flatten().long()
    places = torch.arange(1, len(values) + 1, device=values.device)
    return ((values + 1) * places * 2_654_435_761).sum()  # int64 wraps around; the factor is Knuth's
