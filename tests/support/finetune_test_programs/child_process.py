"""Local programs that die with their parent: nothing is left behind, even when the parent is killed."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
from pathlib import Path

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends; runs in a child before exec."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port on which nobody listens now, and which the kernel gives to no outgoing connection meanwhile. Drawn by
    the system: training seeds Python's own generator, so that two processes of a suite may draw the same ports."""
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(15_000, 32_000)  # below the kernel's own range, which begins at 32,768
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


class Program:
    """One running program with its log file."""

    def __init__(self, name: str, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment if environment is not None else dict(os.environ),
                start_new_session=True,  # Ctrl-C goes to the parent alone, which then stops its children in order
                preexec_fn=die_with_parent,
            )

    def check(self) -> None:
        """Raise RuntimeError with the end of the log if the program has ended."""
        if (code := self.process.poll()) is not None:
            raise RuntimeError(f"{self.name} ended with {code}:\n{self.tail()}")

    def tail(self, characters: int = 3000) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-characters:]

    def stop(self, grace: float = 5) -> None:
        """Send SIGTERM, and SIGKILL after `grace` seconds."""
        self.process.terminate()
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
