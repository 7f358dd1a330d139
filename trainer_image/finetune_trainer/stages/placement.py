"""Settles where a run's base model lies, before it is loaded: whole on each GPU, a part on each, or some of its layers
or its vocabulary in host memory.

All processes must share or not, so the run's first process of each pod decides for its own, and the pods agree: one
whose GPUs are too small has the base shared out on all. Layers in host memory are a process's own; the memory plan
takes at least as many for all (training/memory/room.py).
"""

import logging
from pathlib import Path
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode, Parallelism, Precision
from finetune_kernels.planning.memory_plan import MemoryPlan
from finetune_kernels.planning.parts.expert_shape import chosen_experts, experts_a_layer
from finetune_trainer.distributed.group import Group
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.machine import PROCESS_BYTES, free_memory, host_room
from finetune_trainer.model.configuration.reading import read_language_model_config
from finetune_trainer.model.planned_weights import plan_weights
from finetune_trainer.model.published_weights import published_below
from finetune_trainer.preflight.memory.fused_layers import why_not_fused
from finetune_trainer.preflight.memory.parallelism import choose_parallelism, why_not_sharded
from finetune_trainer.preflight.memory.plans import Plans, plan_of_job
from finetune_trainer.preflight.mixture_gpu import mixture_plans
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
    model = read_language_model_config(base)
    if why_not_fused(config, model) is not None and config.training.memory is not MemoryMode.SMALLEST:
        return None  # only fused layers stream, and only Smallest moves the vocabulary of others

    room = host_room(free_memory(), max(1, config.gpus), PROCESS_BYTES)
    plan = plan_of_job(config, _plans_of(config, base, model), available_bytes(device), room)
    return None if plan is None else placement_by(plan)


def placement_by(plan: MemoryPlan) -> InHostMemory | None:
    """Returns what a base that is trained by `plan` has in host memory; None: nothing."""
    layers, vocabulary = plan.streamed_layers, plan.host_bytes > 0
    if layers:
        log.info("the weights of %d layers are loaded into host memory, and stream from there", layers)
    if vocabulary:
        log.info("embedding and head are loaded into host memory")
    return InHostMemory(layers, vocabulary) if layers or vocabulary else None


def _plans_of(config: RunConfig, base: Path, model: Any) -> Plans | None:
    """The memory plans of the base model in folder `base`, whose configuration is `model`, as preflight made them; None
    if nothing is planned."""
    plans = Plans.of(config, model, Parallelism.REPLICATED)
    if plans is not None or not experts_a_layer(model):
        return plans
    planned = plan_weights(published_below(base).own, config, model.model_type, chosen=chosen_experts(model))
    return None if planned is None else mixture_plans(config, model, planned)
