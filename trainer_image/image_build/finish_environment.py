"""Finishes an environment for an image: takes out what no run uses, compiles every module, opens it to group 0, and
gives all files one time.

    python3 finish_environment.py ENVIRONMENT [LIST OF REMOVALS]

Byte code carries its source's hash and is never checked against it (`unchecked-hash`): an image has one timestamp for
all files, so byte code that is checked by time would be stale, and compiled anew at each start.
"""

import compileall
import os
import py_compile
import shutil
import stat
import subprocess
import sys
from pathlib import Path

NOT_FOR_RUNS = (
    "bin/pip*", "bin/[aA]ctivate*", "lib/python3*/site-packages/pip", "lib/python3*/site-packages/pip-*.dist-info",
    "include", "share/man",
)  # fmt: skip

TIME = 1_767_225_600
"""Of all files, 2026-01-01 UTC: the line tables of compiled kernels carry the times of their sources."""


def remove(environment: Path, patterns: list[str]) -> int:
    """Removes files and folders; returns their bytes. Raises FileNotFoundError if a pattern fits nothing: the list
    then speaks of another version of a package."""
    removed = 0
    for pattern in patterns:
        found = sorted(environment.glob(pattern))
        if not found:
            raise FileNotFoundError(
                f"{pattern}: nothing of that name is in {environment}; correct the list of removals"
            )
        for path in found:
            size = _bytes_of(path)
            removed += size
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            print(f"removed {size / 1e6:8.1f} MB  {path.relative_to(environment)}")
    return removed


def read_removals(path: Path) -> tuple[list[str], list[str]]:
    """Patterns to remove, and files whose debug information goes (lines that begin with `strip`), of a list."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    stripped = [line.removeprefix("strip ").strip() for line in lines if line.startswith("strip ")]
    return [line for line in lines if line and not line.startswith("strip ")], stripped


def strip_debug(environment: Path, patterns: list[str]) -> None:
    """Removes debug information; code, symbols and links stay."""
    for path in [path for pattern in patterns for path in sorted(environment.glob(pattern))]:
        before = path.stat().st_size
        subprocess.run(["strip", "--strip-debug", path], check=True)
        print(f"stripped {(before - path.stat().st_size) / 1e6:7.1f} MB  {path.relative_to(environment)}")


def compile_modules(folder: Path, root: Path = Path("/")) -> None:
    """Compiles every module below a folder, which is `root`'s: tracebacks name the path that it has in the image."""
    assert os.environ.get("PYTHONHASHSEED") == "0", "byte code of sets of words depends on it"
    compileall.compile_dir(
        folder,
        quiet=2,
        force=True,
        workers=1,
        stripdir=str(root),
        prependdir="/",
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def open_to_group_0(environment: Path) -> None:
    """Lets group 0 read everything: OpenShift runs an image as a random user of that group."""
    for path in [environment, *environment.rglob("*")]:
        if not path.is_symlink():
            is_program = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if is_program else 0o644)


def set_times(environment: Path) -> None:
    """Gives every file and folder the same time, so that two builds of one source are equal to the byte."""
    for path in [environment, *environment.rglob("*")]:
        os.utime(path, (TIME, TIME), follow_symlinks=False)


def _bytes_of(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(each.lstat().st_size for each in path.rglob("*") if not each.is_dir())


def main() -> None:
    """Finishes the environment of the command line."""
    environment = Path(sys.argv[1])
    patterns = [pattern for pattern in NOT_FOR_RUNS if any(environment.glob(pattern))]
    stripped: list[str] = []
    if len(sys.argv) > 2:
        listed, stripped = read_removals(Path(sys.argv[2]))
        patterns += listed

    print(f"removed {remove(environment, patterns) / 1e6:.0f} MB in all")
    strip_debug(environment, stripped)

    compile_modules(environment)
    open_to_group_0(environment)
    set_times(environment)


if __name__ == "__main__":
    main()
