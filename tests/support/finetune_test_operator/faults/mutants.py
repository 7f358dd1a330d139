"""Copies of the operator with a mistake planted in them."""

import shutil
from pathlib import Path

import finetune_operator


def write_mutant(folder: Path, file: str, was: str, now: str) -> Path:
    """Write a copy of the operator's package with one mistake; returns the folder it lies in."""
    package = folder / "finetune_operator"
    shutil.copytree(Path(str(finetune_operator.__file__)).parent, package)
    source = (package / file).read_text()
    assert source.count(was) == 1, f"{was!r} stands once in {file}, not {source.count(was)} times: adapt the mutant"
    (package / file).write_text(source.replace(was, now))
    return folder
