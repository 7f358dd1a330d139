"""What a memory plan may fill, of a base part of which was loaded into host memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Precision
from finetune_kernels.vocabulary.host_vocabulary import movable_bytes, move_to_host
from finetune_trainer.distributed.world import ALONE
from finetune_trainer.job.machine import host_room
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.streamed_loading import InHostMemory
from finetune_trainer.training.memory import room
from finetune_trainer.training.memory.room import Room

GIB = 2**30
GPU = torch.device("cuda")


def test_weights_that_were_loaded_into_host_memory_are_reckoned_as_on_the_gpu(
    run_config: Callable[..., RunConfig], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a plan may have them there or here; the host's memory that they take already is the plan's."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    monkeypatch.setattr(room, "available_bytes", lambda device: 8 * GIB)
    monkeypatch.setattr(room, "free_memory", lambda: 4 * GIB)
    config = run_config()
    placement = InHostMemory(1, vocabulary=True)
    loaded = load_model(tiny_base, config.model, Precision.FP32, gpus=0, placement=placement)
    loaded.model.requires_grad_(False)
    there, tables = loaded.streamed.host_bytes, movable_bytes(loaded.model)
    assert min(there, tables) > 1000

    def beside(loaded_into: int, device: torch.device) -> None:
        found = Room.measured(replace(loaded, device=device), config, ALONE)
        assert found.base - GIB + loaded.streamed.slot_bytes == loaded_into
        assert found.host - host_room(4 * GIB, 1) == loaded_into

    beside(there + tables, GPU)
    beside(there, torch.device("cpu"))
    move_to_host(loaded.model)  # now a plan has them there, which counts them itself
    beside(there, GPU)
