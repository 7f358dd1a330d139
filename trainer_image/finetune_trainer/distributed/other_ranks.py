"""The other ranks of a run on this machine: processes that rank 0 starts, watches and outlives.

Rank 0 is the process of the run itself. It alone fetches, reports, stores and publishes; the others load the same base
model, and train along. They end with rank 0, whatever ends it, as their standard input closes then. If one of them
fails, rank 0 would wait for it for ever: a thread ends the run with that rank's reason instead.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Self

import torch
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import DistError

from finetune_api.base import ApiModel
from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_trainer.distributed.cards import VISIBLE, all_cards
from finetune_trainer.distributed.launched import joined_store
from finetune_trainer.distributed.world import ALONE, World
from finetune_trainer.errors import TrainerError

log = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"
MODULE = "finetune_trainer.cli.rank"
READY = "ready"
"""Key that rank 0 sets once it is about to train: the others may wait for it for as long as data are prepared."""

POLL_SECONDS = 0.2
CONFIRM_SECONDS = 5.0
"""Time in which a rank whose connection broke turns out to have failed."""

STACKS_SECONDS = 1.0


class RankTask(ApiModel):
    """Task of one of the other ranks, as a file."""

    config: RunConfig
    base_model: Path
    """Folder of the base model, which rank 0 has fetched."""

    work: Path
    """Folder of this rank alone."""

    rank: int
    size: int
    port: int
    """TCP port at which rank 0 keeps the store that all meet at."""

    @property
    def failure_file(self) -> Path:
        """File in which the rank says why it failed."""
        return self.work / "failure.json"


class RankFailure(ApiModel):
    """Reason and message of a rank that failed."""

    reason: FailureReason
    message: str


class OtherRanks:
    """Processes of ranks 1 to `size` - 1; none in a run of one process."""

    _running: "OtherRanks | None" = None

    def __init__(self, size: int, on_failure: Callable[[TrainerError], None]) -> None:
        self.size = size
        self._on_failure = on_failure
        self._store: TCPStore | None = None
        self._tasks: list[RankTask] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closing = threading.Event()

    @classmethod
    @contextmanager
    def started(
        cls, config: RunConfig, base_model: Path, work: Path, size: int, on_failure: Callable[[TrainerError], None]
    ) -> Iterator[Self]:
        """Starts them, and ends them when the code inside ends. `on_failure` ends this process, from a thread.

        Raises a rank's TrainerError if it failed, in place of an error that follows from that.
        """
        ranks = cls(size, on_failure)
        ranks._start(config, base_model, work)

        try:
            yield ranks
        except TrainerError:
            raise
        except Exception as error:
            failure = ranks._find_failure(CONFIRM_SECONDS) if is_lost_connection(error) else None
            if failure is None:
                raise
            raise failure from error
        finally:
            ranks._end()

    @classmethod
    def end_with_stacks(cls) -> bool:
        """Has the other ranks write the stacks of all their threads into the log, and ends them; False if there are
        none."""
        ranks = cls._running
        if ranks is None:
            return False

        for process in ranks._processes:
            process.send_signal(signal.SIGUSR1)
        time.sleep(STACKS_SECONDS)
        ranks._end()
        return True

    @contextmanager
    def joined(self) -> Iterator[World]:
        """Yields the world of the run, once all ranks are there."""
        if self._store is None:
            yield ALONE
            return

        self._store.set(READY, "1")
        with joined_store(self._store, 0, self.size) as world:
            yield world
        self._wait()

    def _start(self, config: RunConfig, base_model: Path, work: Path) -> None:
        if self.size == 1:
            return

        torch.set_num_threads(_threads(self.size))
        os.environ |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
        self._store = _loopback_store(self.size)
        for rank in range(1, self.size):
            folder = work / "ranks" / str(rank)
            folder.mkdir(parents=True)
            task = RankTask(
                config=config, base_model=base_model, work=folder, rank=rank, size=self.size, port=self._store.port
            )
            self._tasks.append(task)
            self._processes.append(_launch(task))

        log.info("%d processes train together, this is rank 0", self.size)
        OtherRanks._running = self
        threading.Thread(target=self._watch, name="other-ranks", daemon=True).start()

    def _watch(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            if (failure := self._find_failure()) is not None:
                log.error("%s: %s", failure.reason, failure.message)
                self._on_failure(failure)
                return

    def _find_failure(self, patience: float = 0.0) -> TrainerError | None:
        """Returns the error of the first rank that failed; waits for one for `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            for task, process in zip(self._tasks, self._processes, strict=True):
                if code := process.poll():
                    return _explain(task, code)
            if time.monotonic() >= deadline or not self._processes:
                return None
            time.sleep(POLL_SECONDS)

    def _wait(self) -> None:
        for process in self._processes:
            process.wait()

    def _end(self) -> None:
        self._closing.set()
        OtherRanks._running = None
        for process in self._processes:
            process.kill()
            process.communicate()


def _loopback_store(size: int) -> TCPStore:
    """Opens the store that all ranks meet at, for this pod alone: whoever reaches it could join the run, and the ranks
    believe each other. By itself it would listen on every address."""
    listening = socket.create_server((LOCALHOST, 0))
    port = listening.getsockname()[1]
    return TCPStore(LOCALHOST, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def _launch(task: RankTask) -> subprocess.Popen[bytes]:
    file = task.work / "task.json"
    file.write_text(task.model_dump_json(by_alias=True), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": str(_threads(task.size))}
    if task.config.gpus:
        environment[VISIBLE] = all_cards()[task.rank]
    # A session of its own: Ctrl-C at a terminal is for rank 0, which stops all of them in order.
    command = [sys.executable, "-P", "-m", MODULE, str(file)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)


def _threads(size: int) -> int:
    """Threads of each of `size` processes."""
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // size)


def _explain(task: RankTask, code: int) -> TrainerError:
    """Returns why a rank ended with an exit code other than 0."""
    who = f"rank {task.rank} of {task.size}"
    try:
        failure = RankFailure.model_validate_json(task.failure_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL:
            how += ", as processes are when memory runs out (spec.resources.memory)"
        return TrainerError(FailureReason.INTERNAL_ERROR, f"{who} {how}, see the trainer's log")
    return TrainerError(failure.reason, f"{who}: {failure.message}")


def is_lost_connection(error: BaseException) -> bool:
    """True for an error of gloo, NCCL or the store, which says only that another rank is gone."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def connect(task: RankTask) -> TCPStore:
    """Connects one of the other ranks to the store of rank 0."""
    patience = timedelta(seconds=60)
    return TCPStore(LOCALHOST, task.port, task.size, is_master=False, timeout=patience, wait_for_workers=False)


def await_ready(store: Store) -> None:
    """Waits until rank 0 is about to train."""
    store.wait([READY], timedelta(days=365))
