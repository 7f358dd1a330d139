"""Completion in the shells themselves: the Tab key in bash, zsh and fish, with names from the real API server."""

import fcntl
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from finetune_client.complete import candidates
from finetune_client.verbs import VERBS
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_programs.binaries import kube_binary

PROGRAMS = Path(sys.executable).parent
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source <(finetune completion bash)"),
    "zsh": (["zsh", "-f", "-i"], "autoload -Uz compinit; compinit -u -D; source <(finetune completion zsh)"),
    "fish": (["fish", "--no-config", "--private"], "finetune completion fish | source"),
}
SECONDS = 20
_ESCAPES = re.compile(r"\x1b\[[0-9;?<>=]*[a-zA-Z]|\x1b[\]P][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()][B0]|\x1b[=>]|[\x08\r]")


def _take_terminal() -> None:
    """Make standard input the terminal of this session: fish goes nowhere without one."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A shell with a keyboard and a screen."""

    def __init__(self, command: list[str], home: Path) -> None:
        keys, screen = pty.openpty()
        environment = os.environ | {
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}", "HOME": str(home), "XDG_DATA_HOME": str(home),
            "TERM": "dumb", "PS1": "$ ", "KUBECONFIG": str(home / "none"), "COLUMNS": "200",
        }  # fmt: skip
        self._keys = keys
        self._shell = subprocess.Popen(
            command, stdin=screen, stdout=screen, stderr=screen, env=environment, cwd=home, start_new_session=True,
            preexec_fn=_take_terminal)  # fmt: skip
        os.close(screen)
        self.shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._shell.kill()
        self._shell.wait(10)
        os.close(self._keys)

    def type(self, text: str) -> None:
        """Press keys; what was on the screen before is forgotten."""
        self.shown = ""
        os.write(self._keys, text.encode())

    def wait_for(self, text: str) -> None:
        """Wait until the screen shows a text; raises AssertionError with the screen."""
        end = time.monotonic() + SECONDS
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} is not in {self.shown!r}"
            if select.select([self._keys], [], [], 0.1)[0]:
                self.shown += _ESCAPES.sub("", os.read(self._keys, 65_536).decode(errors="replace"))


@pytest.fixture(params=SHELLS)
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    command, load = SHELLS[request.param]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed on this machine: `apt-get install {command[0]}` brings it")

    with Terminal(command, tmp_path) as terminal:
        terminal.type(f"{load}; echo lo''aded\n")
        terminal.wait_for("loaded\n")
        time.sleep(0.5)  # the prompt
        yield terminal


def test_commands_and_options_are_completed(terminal: Terminal) -> None:
    terminal.type("finetune descr\t")
    terminal.wait_for("describe")
    terminal.type("\x15")
    terminal.type("finetune logs bot --pref\t")
    terminal.wait_for("--preflight")


@pytest.mark.cluster
def test_names_of_jobs_are_completed(operator: OperatorProcess, jobs: Any, users: Any, terminal: Terminal) -> None:
    jobs.create("support-bot")
    jobs.create("other")
    terminal.type(f"finetune describe --kubeconfig {users.reader()} supp\t")
    terminal.wait_for("support-bot")


def test_what_a_command_takes_is_offered() -> None:
    assert "--attempt" in candidates(["logs", "bot", "--"], VERBS)
    assert "--attempt" not in candidates(["list", "--"], VERBS)
    assert candidates(["artifacts", "--download", ""], VERBS) == [], "files, which the shell itself completes"
    assert candidates(["submit", ""], VERBS) == []


@pytest.mark.cluster
def test_kubectl_runs_the_plugin_and_completes_its_words(
    operator: OperatorProcess, jobs: Any, users: Any, namespace: str
) -> None:
    jobs.create("support-bot")
    kubeconfig = str(users.reader())

    def kubectl(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "KUBECONFIG": kubeconfig}
        command = [str(kube_binary()), "kubectl", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    listed = kubectl("finetune", "list", "-n", namespace)
    assert listed.returncode == 0, listed.stderr
    assert "support-bot" in listed.stdout
    assert kubectl("finetune", "describe", "suport-bot").returncode == 3, "the plugin's exit code is kubectl's"
    assert "describe\n" in kubectl("__complete", "finetune", "descr").stdout
    assert "support-bot\n" in kubectl("__complete", "finetune", "describe", "supp").stdout
