"""Settles where a run's base model lies, before it is loaded: whole on each GPU, a part on each, or some of its layers
in host memory.

All processes must share or not, so the run's first process of each pod decides for its own, and the pods agree: one
whose GPUs are too small has the base shared out on all. Layers in host memory are a process's own; the memory plan
takes at least as many for all (training/memory/room.py).
"""

import logging
from pathlib import Path

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Parallelism, Precision
from finetune_trainer.distributed.group import Group
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.machine import PROCESS_BYTES, free_memory, host_room
from finetune_trainer.model.multimodal import read_language_model_config
from finetune_trainer.preflight.memory.parallelism import choose_parallelism, why_not_sharded
from finetune_trainer.preflight.memory.plans import streamed_layers
from finetune_trainer.stages.model_loading import choose_device, resolve_precision
from finetune_trainer.stages.streamed_loading import InHostMemory, Placement, Share
from finetune_trainer.training.memory.room import available_bytes

log = logging.getLogger(__name__)


def settle_parallelism(config: RunConfig, base: Path, group: Group) -> RunConfig:
    """Returns `config` with Replicated or Sharded in place of Auto, for the base model in folder `base`.

    Raises TrainerError (InvalidConfiguration) for a job that asks for Sharded and cannot have it.
    """
    model, device = read_language_model_config(base), choose_device(config.gpus)
    total = available_bytes(device) if device.type == "cuda" else None
    running = config.model_copy(update={"gpus": group.local, "nodes": group.nodes})
    own = choose_parallelism(running, model, total) is Parallelism.SHARDED
    settled = Parallelism.SHARDED if group.agrees_on("parallelism", own) else Parallelism.REPLICATED

    if settled is Parallelism.SHARDED and (reason := why_not_sharded(config, model)) is not None:
        message = f"spec.training.parallelism: Sharded is not possible: {reason}; write Replicated"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
    if settled is Parallelism.SHARDED:
        log.info("each of %d processes keeps a part of the base model, and gathers it layer by layer", group.size)
    elif config.training.parallelism is Parallelism.SHARDED:
        log.warning("spec.training.parallelism is Sharded, and this run has one process: it keeps the whole base model")

    training = config.training.model_copy(update={"parallelism": settled})
    return config.model_copy(update={"training": training})


def placement_of(config: RunConfig, base: Path, rank: int, size: int) -> Placement | None:
    """Returns where the base model in folder `base` lies for `rank` of `size`, in a run whose parallelism is settled;
    None: whole on its GPU."""
    if config.training.parallelism is Parallelism.SHARDED:
        return Share(rank, size)

    device = choose_device(config.gpus)
    is_planned = device.type == "cuda" and config.kernels
    if not is_planned or resolve_precision(config.training.precision, device) is Precision.FP32:
        return None  # no memory plan, which would count the layers

    room = host_room(free_memory(), max(1, config.gpus), PROCESS_BYTES)
    layers = streamed_layers(config, read_language_model_config(base), available_bytes(device), room)
    if not layers:
        return None
    log.info("the weights of %d layers are loaded into host memory, and stream from there", layers)
    return InHostMemory(layers)
