"""A smaller card, emulated, and a base model as a run on that card would load it."""

from pathlib import Path
from typing import Any

import torch

from finetune_api.run_config import RunConfig
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.placement import placement_of
from finetune_trainer.training.loaded_model import LoadedModel
from speed.rows import SHAPES, Row
from speed.several.random_base import random_base, streaming_placement

GIB = 2**30
CONTEXT_BYTES = GIB // 2
"""Memory that CUDA's context takes on a real card, outside the allocator."""


def limit_card(gib: float) -> int:
    """Lets this process have what a card of `gib` GiB has for tensors; returns these bytes."""
    torch.cuda.empty_cache()
    limit, whole = int(gib * GIB) - CONTEXT_BYTES, torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole))
    return limit


def load_base(row: Row, config: RunConfig, folder: Path) -> LoadedModel:
    """Loads the row's model from `folder`, or draws it on the device, with as many layers in host memory as a run would
    put there."""
    if not row.on_device:
        placement = placement_of(config, folder, rank=0, size=1)
        return load_model(folder, config.model, config.training.precision, gpus=1, placement=placement)

    shape: dict[str, Any] = SHAPES[row.model]
    device = torch.device("cuda", torch.cuda.current_device())
    return random_base(shape, device, streaming_placement(config, shape, device, processes=1))
