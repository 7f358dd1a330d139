"""Joins the processes of a run: those of torchrun, or those that rank 0 has started (other_ranks.py).

NCCL carries what is on GPUs, gloo what is on CPUs.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from finetune_trainer.distributed.cards import see_one_card
from finetune_trainer.distributed.world import ALONE, World
from finetune_trainer.stopping import run_within

NEVER = timedelta(days=365)
"""Patience of a collective: rank 0 may store a checkpoint for long meanwhile. The watchdog ends runs that hang."""
CLOSE_SECONDS = 5.0
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")


@contextmanager
def joined_world() -> Iterator[World]:
    """Yields this process's place among those that torchrun has started; `ALONE` without torchrun.

    Hides the others from transformers and accelerate, which would wrap the model and deal out the rows in ways of
    their own: to them, this is a run of one process on one card. Call it before either is imported and CUDA is used.
    """
    hidden = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    size = int(hidden.get("WORLD_SIZE", "1"))
    if size > 1:
        see_one_card(int(hidden["LOCAL_RANK"]))
        dist.init_process_group(_backend(), timeout=NEVER)

    for name in hidden:
        del os.environ[name]
    try:
        yield World(int(hidden["RANK"]), size) if size > 1 else ALONE
    finally:
        os.environ.update(hidden)
        if size > 1:
            dist.destroy_process_group()


@contextmanager
def joined_store(store: Store, rank: int, size: int, nodes: int = 1) -> Iterator[World]:
    """Yields this process's place among those that meet at `store`; waits until all of them are there."""
    # Without it, NCCL ends a process whose neighbour is gone, before it can say why (other_ranks.py does).
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    logging.getLogger("transformers.training_args").addFilter(_says_nothing_of_ddp)
    dist.init_process_group(_backend(), store=store, rank=rank, world_size=size, timeout=NEVER)

    try:
        yield World(rank, size, nodes)
    except BaseException:
        with suppress(Exception):  # it may wait for ranks that are gone
            run_within(CLOSE_SECONDS, dist.destroy_process_group)
        raise
    dist.destroy_process_group()


def _says_nothing_of_ddp(record: logging.LogRecord) -> bool:
    """False for transformers' warning that its own data parallelism is not used."""
    return "process group is initialized" not in record.getMessage()


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
