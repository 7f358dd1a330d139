"""Memory that every process of a run has, so that all of them make the same memory plan."""

from dataclasses import dataclass

import torch

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Precision
from finetune_kernels.planning.rates import H200, H200_FP8, Rates
from finetune_kernels.vocabulary.host_vocabulary import waiting_bytes
from finetune_trainer.distributed.world import World
from finetune_trainer.job.machine import free_memory, host_room
from finetune_trainer.training.loaded_model import LoadedModel


@dataclass(frozen=True)
class Room:
    """Memory that a process has: the least of what the run's processes have, so that all of them plan alike."""

    base: int
    """Bytes of the GPU that the frozen model and the adapters take, with all weights on it."""
    total: int
    """Bytes of the GPU that a plan may fill."""
    host: int
    """Bytes of host memory that a plan may pin."""
    rates: Rates = H200
    streamed_layers: int = 0
    """Layers whose weights some process has loaded into host memory."""

    @classmethod
    def measured(cls, loaded: LoadedModel, config: RunConfig, world: World) -> "Room":
        """Asks every process for its own. With a base that is shared out, NCCL's buffers are made before."""
        if loaded.window is not None:
            loaded.window.use(0, trains=False)
            loaded.window.close()

        # Weights that were loaded into host memory are reckoned as on the GPU: how many stay there is for the plan.
        streamed = loaded.streamed
        loaded_there = streamed.host_bytes + waiting_bytes(loaded.model, loaded.device)
        base = torch.cuda.memory_allocated(loaded.device) - streamed.slot_bytes + loaded_there
        host = host_room(free_memory(), max(1, config.gpus)) + loaded_there

        own = (base, available_bytes(loaded.device), host, len(streamed))
        bases, totals, hosts, layers = zip(*world.gather_numbers(*own), strict=True)
        rates = H200_FP8 if multiplies_fp8(loaded, config) else H200
        return cls(int(max(bases)), int(min(totals)), int(min(hosts)), rates, int(max(layers)))


def multiplies_fp8(loaded: LoadedModel, config: RunConfig) -> bool:
    """True if the job asks for FP8 and each process has all weights, as FP8 needs."""
    return config.training.precision is Precision.FP8 and loaded.window is None


def available_bytes(device: torch.device) -> int:
    """Bytes that this process may use in all: its own and the free ones, at most its share of the card."""
    # Memory that PyTorch has reserved counts as used on the card, but this process can use it.
    free, whole = torch.cuda.mem_get_info(device)
    share = int(torch.cuda.get_per_process_memory_fraction() * whole)  # it takes no device without a number
    return min(free + torch.cuda.memory_reserved(device), share)
