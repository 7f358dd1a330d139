"""The other ranks of a run, as the kernel shows them."""

from pathlib import Path


def other_ranks(pid: int) -> list[int]:
    """Processes of the ranks that a trainer has started."""
    tables = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for table in tables for child in table.read_text().split()]
    return [child for child in children if b"finetune_trainer.cli.rank" in Path(f"/proc/{child}/cmdline").read_bytes()]
