"""One run of a container: a local process in a session of its own, its log, its exit and its termination message."""

import asyncio
import datetime
import os
import signal
import subprocess
from pathlib import Path

from finetune_devcluster.process_node.api import Object
from finetune_test_programs.child_process import die_with_parent

MESSAGE_BYTES = 4096
KILLED = 128 + signal.SIGKILL


def now() -> str:
    """The current time as Kubernetes writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ContainerRun:
    """One process of a container."""

    def __init__(self, identity: str, container: Object, folder: Path, number: int) -> None:
        self.id = f"process://{identity}-{number}"
        self.container = container
        self.log = folder / f"{number}.log"
        self.termination_log = folder / f"{number}.termination-log"
        self.termination_log.touch()
        self.started = now()
        self.forced_reason: str | None = None
        self.has_ended = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        """Start the process; raises OSError if the program is missing."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.started = now()

    @property
    def pid(self) -> int:
        """Process id, which is also its process group."""
        assert self._process
        return self._process.pid

    async def wait(self) -> int:
        """Wait for the end; returns the exit code as a container runtime reports it (128 + signal)."""
        assert self._process
        process = self._process

        descriptor = os.pidfd_open(process.pid)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()

        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

        code = process.wait()
        self.signal(signal.SIGKILL)  # when a container ends, everything in it ends
        self.has_ended = True
        return code if code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        """Send a signal to the whole group."""
        if self._process:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                return

    async def stop(self, grace: float) -> None:
        """Send SIGTERM, and SIGKILL after `grace` seconds; `wait` returns the exit code."""
        self.signal(signal.SIGTERM)
        await asyncio.sleep(grace)
        self.signal(signal.SIGKILL)

    def terminated(self, code: int) -> Object:
        """The `terminated` state of this run."""
        reason = self.forced_reason or ("Completed" if code == 0 else "Error")
        state: Object = {
            "exitCode": code,
            "reason": reason,
            "startedAt": self.started,
            "finishedAt": now(),
            "containerID": self.id,
        }
        if message := self._message(code):
            state["message"] = message
        return state

    def _message(self, code: int) -> str:
        text = self.termination_log.read_bytes()[:MESSAGE_BYTES]
        falls_back = self.container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
        if not text and code != 0 and falls_back:
            text = self.log.read_bytes()[-2048:]
        return text.decode(errors="replace")
