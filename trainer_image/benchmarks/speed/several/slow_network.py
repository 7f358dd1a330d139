"""A run whose sums take as long as they would between nodes on a slow network."""

import time
from dataclasses import dataclass

import torch

from finetune_trainer.distributed.world import World


def exchange_seconds(size: int, nodes: int, gigabits: float) -> float:
    """Returns the seconds in which `size` bytes are summed over nodes whose links take so many gigabits a second: a
    ring moves 2 (N - 1) / N of them through each link, however many GPUs a node has."""
    return size * 8 * 2 * (nodes - 1) / nodes / (gigabits * 1e9)


@dataclass(frozen=True)
class SlowWorld(World):
    """Processes of one node that wait before each sum as if every one of them were a node of its own."""

    gigabits: float = 10.0

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Replaces `values` by their sum over all processes, after a wait; returns them."""
        if values.is_cuda:
            torch.cuda.synchronize()
        time.sleep(exchange_seconds(values.numel() * values.element_size(), self.size, self.gigabits))
        return super().sum_(values)
