"""The other ranks of a run in this pod: processes that the pod's first rank starts, watches and outlives.

Rank 0 is the process of the run itself. It alone fetches, reports, stores and publishes; the others load the same base
model, and train along. They end with rank 0, whatever ends it, as their standard input closes then. If one of them
fails, rank 0 would wait for it for ever: a thread ends the run with that rank's reason instead. On several nodes, the
first rank of each pod does so for its own (nodes/meeting.py), and fetches and formats for them.
"""

import logging
import os
import pickle
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
from typing import Any, Self

import torch
from torch._C._distributed_c10d import Store, TCPStore

from finetune_api.base import ApiModel
from finetune_api.run_config import RunConfig
from finetune_trainer.distributed.cards import VISIBLE, all_cards
from finetune_trainer.distributed.group import Group
from finetune_trainer.distributed.launched import joined_store
from finetune_trainer.distributed.nodes.meeting import BEAT_SECONDS, LOCALHOST
from finetune_trainer.distributed.rank_ends import count_memory_kills, explain_end, is_lost_connection
from finetune_trainer.distributed.world import ALONE, World
from finetune_trainer.errors import TrainerError
from finetune_trainer.stopping import stop_point

log = logging.getLogger(__name__)

MODULE = "finetune_trainer.cli.rank"
READY = "ready"
"""Key that rank 0 sets once it is about to train: the others may wait for it for as long as data are prepared."""

POLL_SECONDS = 0.2
ROWS_FILE = "rows.pickle"
CONFIRM_SECONDS = 5.0
"""Time in which a rank whose connection broke turns out to have failed."""

STACKS_SECONDS = 1.0


class BaseFiles(ApiModel):
    """The base model that the pod's first rank has fetched."""

    folder: Path
    digest: str
    """SHA-256 of its files."""
    nf4_cache: Path | None = None
    """Folder that may hold it in NF4."""


class RankTask(ApiModel):
    """Task of one of the other ranks, as a file."""

    config: RunConfig
    base_model: BaseFiles

    work: Path
    """Folder of this rank alone."""

    rank: int
    size: int
    place: int = 1
    """Place among the pod's processes, from 0, and so the number of its GPU."""

    nodes: int = 1
    address: str = LOCALHOST
    port: int
    """TCP port at which rank 0 keeps the store that all meet at."""

    @property
    def failure_file(self) -> Path:
        """File in which the rank says why it failed."""
        return self.work / "failure.json"

    @property
    def rows_file(self) -> Path:
        """File with the pod's formatted rows, in a run on several nodes."""
        return self.work.parent / ROWS_FILE


class OtherRanks:
    """Processes of the pod's further ranks; none in a run of one process a pod."""

    _running: "OtherRanks | None" = None

    def __init__(self, group: Group, work: Path, on_failure: Callable[[TrainerError], None]) -> None:
        self._group = group
        self._folder = work / "ranks"
        self._on_failure = on_failure
        self._store: TCPStore | None = group.store
        self._tasks: list[RankTask] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closing = threading.Event()
        self._memory_kills = count_memory_kills()

    @classmethod
    @contextmanager
    def started(
        cls, config: RunConfig, base: BaseFiles, work: Path, group: Group, on_failure: Callable[[TrainerError], None]
    ) -> Iterator[Self]:
        """Starts them, and ends them when the code inside ends. `on_failure` ends this process, from a thread.

        Raises a rank's TrainerError if it failed, in place of an error that follows from that.
        """
        ranks = cls(group, work, on_failure)
        ranks._start(config, base)

        try:
            yield ranks
        except TrainerError:
            raise
        except Exception as error:
            failure = ranks._find_failure(CONFIRM_SECONDS) if is_lost_connection(error) else None
            if failure is not None:
                raise failure from error
            if is_lost_connection(error) and group.meeting is not None:
                group.meeting.await_others_end()
            raise
        finally:
            ranks._end()

    @classmethod
    def end_with_stacks(cls) -> bool:
        """Has the other ranks write the stacks of all their threads into the log, and ends them; False if there are
        none."""
        ranks = cls._running
        if ranks is None:
            return False

        if (meeting := ranks._group.meeting) is not None:
            meeting.ask_for_stacks()
        ranks.write_stacks()
        time.sleep(STACKS_SECONDS if meeting is None else 2 * STACKS_SECONDS + BEAT_SECONDS)
        ranks._end()
        return True

    def write_stacks(self) -> None:
        """Has the pod's other ranks write the stacks of all their threads into the log; one that is frozen, too."""
        for process in self._processes:
            process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGCONT)

    @contextmanager
    def joined(self, rows: Any) -> Iterator[World]:
        """Yields the world of the run, once all ranks are there. `rows`: the pod's formatted rows, for its ranks."""
        group = self._group
        if self._store is None:
            yield ALONE
            return

        if group.nodes > 1 and self._tasks:
            self._tasks[0].rows_file.write_bytes(pickle.dumps(rows))
        if group.meeting is not None:
            group.meeting.arrive()
        if group.leads:
            self._store.set(READY, "1")
        while not self._store.check([READY]):
            stop_point()
            time.sleep(POLL_SECONDS)
        with joined_store(self._store, group.first, group.size, group.nodes) as world:
            yield world
        self._wait()

    def _start(self, config: RunConfig, base: BaseFiles) -> None:
        group = self._group
        if group.size == 1:
            return

        torch.set_num_threads(_threads(group.local))
        if self._store is None:
            os.environ |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
            self._store = _loopback_store(group.size)
        for place in range(1, group.local):
            rank = group.first + place
            folder = self._folder / str(rank)
            folder.mkdir(parents=True)
            task = RankTask(
                config=config,
                base_model=base,
                work=folder,
                rank=rank,
                size=group.size,
                place=place,
                nodes=group.nodes,
                address=group.address,
                port=self._store.port,
            )
            self._tasks.append(task)
            self._processes.append(_launch(task, group.local))

        log.info("%d processes train together, this is rank %d", group.size, group.first)
        OtherRanks._running = self
        if group.meeting is not None:
            group.meeting.on_stacks = self.write_stacks
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
                    memory_ran_out = count_memory_kills() > self._memory_kills
                    who = f"rank {task.rank} of {task.size}"
                    return explain_end(who, task.failure_file, code, memory_ran_out=memory_ran_out)
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


def _launch(task: RankTask, local: int) -> subprocess.Popen[bytes]:
    file = task.work / "task.json"
    file.write_text(task.model_dump_json(by_alias=True), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": str(_threads(local))}
    if task.config.gpus:
        environment[VISIBLE] = all_cards()[task.place]
    # A session of its own: Ctrl-C at a terminal is for rank 0, which stops all of them in order.
    command = [sys.executable, "-P", "-m", MODULE, str(file)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)


def _threads(size: int) -> int:
    """Threads of each of `size` processes."""
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // size)


def connect(task: RankTask) -> TCPStore:
    """Connects one of the other ranks to the store of rank 0."""
    patience = timedelta(seconds=60)
    return TCPStore(task.address, task.port, task.size, is_master=False, timeout=patience, wait_for_workers=False)


def await_ready(store: Store) -> None:
    """Waits until rank 0 is about to train."""
    store.wait([READY], timedelta(days=365))
