"""The way from a pod to the first one: a name that becomes an address, and a port that answers."""

import logging
import socket
import time
from collections.abc import Callable

from finetune_api.failures import FailureReason
from finetune_trainer.distributed.nodes.place import Place
from finetune_trainer.errors import TrainerError
from finetune_trainer.signs_of_life import beat
from finetune_trainer.stopping import stop_point

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
CONNECT_SECONDS = 5.0
SAY_SECONDS = 60.0
BLOCKED_SECONDS = 300.0
"""Time for which packets to a pod that has an address may be lost: a new pod's network takes seconds."""


def await_leader(place: Place, blocked_seconds: float = BLOCKED_SECONDS) -> str:
    """Returns the address of the leading pod, once its port answers. A pod that is not there yet is waited for as long
    as it takes: the operator knows why, and has its deadlines.

    Raises TrainerError (NodeUnreachable) if the pod has an address and its network answers nothing.
    """
    waited, blocked_since = Waited(), None
    while True:
        stop_point()
        try:
            address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0][4][0]
        except OSError:
            blocked_since = None
            waited.say(lambda: f"{place.host} has no address yet: waiting for that pod")
        else:
            found = _knock(str(address), place.port)
            if found is None:
                return str(address)
            # A refusal is an answer: the pod is there, and its trainer is starting.
            blocked_since = None if found is ConnectionRefusedError else blocked_since or time.monotonic()
            waited.say(lambda: f"{place.host}:{place.port} does not answer yet: waiting for its trainer")

        if blocked_since is not None and time.monotonic() - blocked_since > blocked_seconds:
            raise TrainerError(
                FailureReason.NODE_UNREACHABLE,
                f"{place} got no answer from {place.host}:{place.port} ({address}) for {blocked_seconds:.0f} s: "
                "something between the nodes drops the packets, such as a NetworkPolicy or a firewall",
            )
        time.sleep(POLL_SECONDS)


class Waited:
    """Says once a minute what a run waits for; each look is a sign of life."""

    def __init__(self) -> None:
        self._said = -SAY_SECONDS

    def say(self, what: Callable[[], str]) -> None:
        """Logs the sentence, if none was logged in the last minute."""
        beat()
        if time.monotonic() - self._said >= SAY_SECONDS:
            self._said = time.monotonic()
            log.info("%s", what())


def _knock(address: str, port: int) -> type[OSError] | None:
    """Returns None if a port accepts connections, else the kind of error."""
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except OSError as error:
        return type(error)
    return None
