"""The processes that a process has started, as the kernel shows them."""

from contextlib import suppress
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Processes that a process has started itself."""
    found: list[int] = []
    for table in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += map(int, table.read_text().split())
    return found


def other_ranks(pid: int) -> list[int]:
    """Processes of the ranks that a trainer has started."""
    found = []
    for child in children_of(pid):
        with suppress(OSError):  # it has ended
            if b"finetune_trainer.cli.rank" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found
