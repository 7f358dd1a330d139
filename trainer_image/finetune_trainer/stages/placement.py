"""Settles where a run's base model lies, before it is loaded: whole on each GPU, or a part on each.

All processes must do the same, so the run's first process of each pod decides for its own, and the pods agree: one
whose GPUs are too small has the base shared out on all.
"""

import logging
from pathlib import Path

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Parallelism
from finetune_trainer.distributed.group import Group
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.multimodal import read_language_model_config
from finetune_trainer.preflight.memory.parallelism import choose_parallelism, why_not_sharded
from finetune_trainer.stages.model_loading import choose_device
from finetune_trainer.stages.sharded_loading import Share
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


def share_of(config: RunConfig, rank: int, size: int) -> Share | None:
    """Returns what `rank` of `size` keeps of the base model, in a run whose parallelism is settled; None: all."""
    return Share(rank, size) if config.training.parallelism is Parallelism.SHARDED else None
