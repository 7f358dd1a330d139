"""The meeting of a run's pods: a store of torch.distributed (c10d) that the first pod keeps, as torchrun has one.

Each pod shows every two seconds that it lives, and looks at what the others say. Whoever fails says its reason, and
the first pod ends the run with it. A pod whose sign of life is 20 s old is lost. All others then end without being
counted by their Job: they failed for no reason of their own. The Job makes them again, and they go on from the newest
checkpoint.
"""

import faulthandler
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Self

from torch._C._distributed_c10d import TCPStore

from finetune_api.base import ApiModel
from finetune_api.failures import FailureReason
from finetune_trainer.distributed.nodes.place import Place
from finetune_trainer.distributed.nodes.reach import Waited, await_leader
from finetune_trainer.errors import OtherNodeError, TrainerError
from finetune_trainer.stopping import is_requested, stop_point

log = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"
BEAT_SECONDS = 2.0
LOST_SECONDS = 20.0
SUSPECT_SECONDS = 8.0
"""Silence that is enough once a connection to another pod has broken."""

PATIENCE = timedelta(seconds=10)
"""Time in which the store answers a request."""

POLL_SECONDS = 0.2
GOODBYE_SECONDS = 5.0
DONE, OVER = "done", "over"
"""How the first pod's part ended: with a result, or without."""

NO_ANSWER = "node 0 is gone: the store that it keeps does not answer"

End = Callable[[TrainerError], None]
"""Ends this process with the outcome of an error, from any thread."""


class NodeFailure(ApiModel):
    """Reason and message of a pod that failed."""

    node: int
    reason: FailureReason
    message: str


class Meeting:
    """The pods of one attempt, as one of them sees them."""

    running: "Meeting | None" = None

    def __init__(self, place: Place, address: str, store: TCPStore, end: End) -> None:
        self.place = place
        self.address = address
        self.store = store
        # A connection of its own: that of the run is busy for as long as it waits for something.
        self._signs = _connect(address, store.port)
        self._end = end
        self.on_stacks: Callable[[], None] = _write_nothing
        """Has the other processes of this pod write their stacks, once they exist."""

        self._closing = threading.Event()
        self._ended: str | None = None
        self._has_written = False
        self._patience = LOST_SECONDS
        self._looked = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}  # by node: its count of signs, and when that was new

    @classmethod
    @contextmanager
    def opened(cls, place: Place, end: End) -> Iterator[Self]:
        """Opens the store on the first pod, and waits for all others. At the end, tells them how it went."""
        meeting = cls(place, LOCALHOST, _open(place.port), end)
        with meeting._watched():
            meeting._await_others()
            result = OVER
            try:
                yield meeting
                result = DONE
            finally:
                meeting._dismiss(result)

    @classmethod
    @contextmanager
    def joined(cls, place: Place, end: End) -> Iterator[Self]:
        """Joins the first pod's store, as soon as it is there."""
        meeting = cls._join(place, end)
        with meeting._watched():
            yield meeting

    def fail(self, error: TrainerError) -> None:
        """Says why this pod fails, for the first one to end with the same reason."""
        failure = NodeFailure(node=self.place.index, reason=error.reason, message=error.message)
        with suppress(RuntimeError):  # the first pod is gone
            self._signs.set("failure", failure.model_dump_json(by_alias=True))

    def await_end(self) -> bool:
        """Waits until the first pod has done its part; returns True if there is a result."""
        waited = Waited()
        while self._ended is None:
            waited.say(lambda: "this pod's part is done: waiting for the first pod to publish the result")
            stop_point()
            time.sleep(POLL_SECONDS)
        with suppress(RuntimeError):
            self._signs.set(f"bye/{self.place.index}", "1")
        return self._ended == DONE

    def await_others_end(self) -> None:
        """Waits for the watch to end this process: a connection broke, and the cause is another pod. Returns if it
        finds none."""
        self._patience = SUSPECT_SECONDS
        time.sleep(SUSPECT_SECONDS + 3 * BEAT_SECONDS)

    def ignore_losses(self) -> None:
        """The training is over: no other pod is needed any more."""
        self._closing.set()

    def arrive(self) -> None:
        """Says that this pod is about to train. The first one waits for all others, which may load for longer than it:
        each watches over itself until then."""
        if not self.place.leads:
            with suppress(RuntimeError):  # the watch will find that the first pod is gone
                self._signs.set(f"arrived/{self.place.index}", "1")
            return

        waited = Waited()
        while missing := [node for node in self._others if not self.store.check([f"arrived/{node}"])]:
            names = ", ".join(map(str, missing))
            waited.say(lambda names=names: f"{self.place} is ready to train and waits for nodes: {names}")  # type: ignore[misc]
            stop_point()
            time.sleep(POLL_SECONDS)

    def ask_for_stacks(self) -> None:
        """Has every other pod write the stacks of all its processes into its log."""
        with suppress(RuntimeError):
            self._signs.set("stacks", "1")

    @classmethod
    def _join(cls, place: Place, end: End) -> Self:
        waited = Waited()
        while True:
            address = await_leader(place)
            with suppress(RuntimeError):  # it went away meanwhile
                store = _connect(address, place.port)
                if store.add(f"node/{place.index}", 1) == 1:
                    log.info("%s has met %s:%d", place, place.host, place.port)
                    return cls(place, address, store, end)
            # The pod before this one has met there: that attempt is ending.
            waited.say(lambda: f"{place.host} still belongs to the attempt before: waiting for its end")
            stop_point()
            time.sleep(1)

    def _await_others(self) -> None:
        waited = Waited()
        while missing := [node for node in self._others if not self.store.add(f"node/{node}", 0)]:
            names = ", ".join(map(str, missing))
            waited.say(lambda names=names: f"{self.place} waits for the pods of: {names}")  # type: ignore[misc]
            stop_point()
            time.sleep(POLL_SECONDS)
        log.info("all %d nodes are there", self.place.nodes)

    @property
    def _others(self) -> range:
        return range(1, self.place.nodes)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        Meeting.running = self
        threading.Thread(target=self._watch, name="other-nodes", daemon=True).start()
        if not self.place.leads:
            threading.Thread(target=self._await_answers, name="first-node", daemon=True).start()
        try:
            yield
        finally:
            self._closing.set()
            Meeting.running = None

    def _watch(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            try:
                self._signs.add(f"sign/{self.place.index}", 1)
                found = self._look_at_others() if self.place.leads else self._look_at_first()
                self._looked = time.monotonic()
            except RuntimeError:  # DistError is one
                found = _lost(NO_ANSWER)
            if found is not None and not self._closing.is_set():
                self._end_for(found)
                return

    def _await_answers(self) -> None:
        """Ends this pod if the first one is frozen: its store then keeps the connection, and the watch waits for an
        answer for ever."""
        while not self._closing.wait(BEAT_SECONDS):
            if time.monotonic() - self._looked > self._patience:
                self._end_for(_lost(NO_ANSWER))
                return

    def _end_for(self, found: OtherNodeError) -> None:
        log.error("%s: %s", found.reason, found.message)
        self._end(found)

    def _look_at_others(self) -> OtherNodeError | None:
        if self._signs.check(["failure"]):
            failure = NodeFailure.model_validate_json(self._signs.get("failure"))
            return OtherNodeError(failure.reason, f"node {failure.node} of {self.place.nodes}: {failure.message}")

        for node in self._others:
            joined = self._signs.add(f"node/{node}", 0)
            if joined > 1:
                return _lost(f"the pod of node {node} is gone: another one has come in its place")
            if joined and self._is_silent(node):
                return _lost(f"node {node} is gone: it showed no sign of life for {self._patience:.0f} s")
        return None

    def _look_at_first(self) -> OtherNodeError | None:
        if self._signs.check(["ended"]):
            self._ended = self._signs.get("ended").decode()
            return None
        if not self._has_written and self._signs.check(["stacks"]):
            self._has_written = True
            faulthandler.dump_traceback(all_threads=True)
            self.on_stacks()
        if self._is_silent(0):
            return _lost(f"node 0 is gone: it showed no sign of life for {self._patience:.0f} s")
        return None

    def _is_silent(self, node: int) -> bool:
        count, now = self._signs.add(f"sign/{node}", 0), time.monotonic()
        last, since = self._seen.get(node, (-1, now))
        self._seen[node] = (count, since if count == last else now)
        return now - self._seen[node][1] > self._patience

    def _dismiss(self, result: str) -> None:
        """Tells the others how the run ended, and gives them a moment to hear it before the store goes."""
        self._closing.set()
        with suppress(RuntimeError):
            self.store.set("ended", result)
            deadline = time.monotonic() + (0 if is_requested() else GOODBYE_SECONDS)  # all have heard of a stop
            while not self.store.check([f"bye/{node}" for node in self._others]) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)


def _open(port: int) -> TCPStore:
    """Opens the store for all pods of the run. A NetworkPolicy keeps everybody else from it, as it asks for no
    password."""
    listening = (
        socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        if socket.has_dualstack_ipv6()
        else socket.create_server(("", port))
    )
    port = listening.getsockname()[1]
    return TCPStore(LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def _connect(address: str, port: int) -> TCPStore:
    return TCPStore(address, port, is_master=False, timeout=PATIENCE, wait_for_workers=False)


def _write_nothing() -> None:
    """Stands for the processes of a pod that has none but its own."""


def _lost(message: str) -> OtherNodeError:
    return OtherNodeError(FailureReason.INTERRUPTED, message)
