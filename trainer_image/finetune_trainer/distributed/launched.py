"""Joins the processes of torchrun (torch.distributed.run): NCCL between GPUs, gloo between CPUs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from finetune_trainer.distributed.world import ALONE, World

TIMEOUT = timedelta(minutes=10)
"""Time after which a process no longer waits for the others; storing a checkpoint or an evaluation takes less."""
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")


@contextmanager
def joined_world(timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """Yields this process's place among those that torchrun has started; `ALONE` without torchrun.

    Hides the others from transformers and accelerate, which would wrap the model and deal out the rows in ways of
    their own: to them, this is a run of one process on one card. Call it before either is imported and CUDA is used.
    """
    hidden = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    size = int(hidden.get("WORLD_SIZE", "1"))
    if size > 1:
        _see_one_card(int(hidden["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)

    for name in hidden:
        del os.environ[name]
    try:
        yield World(int(hidden["RANK"]), size) if size > 1 else ALONE
    finally:
        os.environ.update(hidden)
        if size > 1:
            dist.destroy_process_group()


def _see_one_card(local: int) -> None:
    """Leaves this process the GPU of its place on the machine, as cuda:0."""
    visible = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[local] if local < len(visible) else str(local)
