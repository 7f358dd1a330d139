"""Measurements of peers on several GPUs: torchrun starts one process a GPU, as the peers' own documentation says.

Every process imports its libraries; rank 0 is told to go on, speaks for all, and gives the result.
"""

import os
import sys
from datetime import timedelta

GO = "go"
"""Key of torchrun's store that rank 0 sets."""


def launch(module: str, gpus: int) -> None:
    """Turns this process, of `module`, into torchrun, which starts its command line once a GPU. Does nothing in those
    processes."""
    if "RANK" in os.environ:
        return
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m", module)
    os.environ["PYTHONSAFEPATH"] = "1"  # torchrun passes no -P on
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv[1:]])  # noqa: S606 (the same program)


def local_rank() -> int:
    """Number of this process's GPU; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """True for the process that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def await_go() -> None:
    """Waits for a line on stdin, which all processes share and rank 0 reads."""
    if is_first():
        sys.stdin.readline()
    if "RANK" not in os.environ:
        return

    from torch._C._distributed_c10d import TCPStore

    # torchrun keeps the store; the libraries are left to join their processes in their own way.
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if is_first():
        store.set(GO, "")
    store.wait([GO], timedelta(days=1))


def largest(value: int) -> int:
    """Returns the largest `value` of all processes."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    held = torch.tensor(value, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held)
