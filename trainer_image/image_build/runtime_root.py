"""Makes the root file system of an image: an environment, Python's runtime, and the libraries that they are linked to.

Runs in the builder stage of both Dockerfiles, with the base's own Python. The last stage starts from scratch and takes
the folder that this leaves, so no image holds a shell, a package manager, a compiler or Python's headers. Needs the
standard library only.

    python3 runtime_root.py ENVIRONMENT ROOT
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from finish_environment import compile_modules, open_to_group_0

LOADER = Path("/lib64/ld-linux-x86-64.so.2")
ELF = b"\x7fELF"
UNUSED_STDLIB = ("test", "idlelib", "lib2to3", "ensurepip", "tkinter", "turtledemo", "pydoc_data", "site-packages",
                 "dist-packages", "LICENSE.txt")  # fmt: skip
UNUSED_PATTERNS = ("config-3*", "__pycache__")
"""`config-3.11-*` has Python's static library."""

OPENED_BY_NAME = ("libgcc_s.so.1", "libstdc++.so.6")
"""libc opens the first when a thread ends; wheels of PyTorch's kind take the second from the system."""

FILES = ("/etc/debian_version", "/etc/os-release", "/usr/lib/os-release", "/etc/ssl/certs/ca-certificates.crt")
"""The NVIDIA container toolkit looks at the first to learn where libraries belong; scanners read the second."""

WRITTEN = {
    "etc/passwd": "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:0:nonroot:/tmp:/sbin/nologin\n",
    "etc/group": "root:x:0:\nnonroot:x:65532:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}


def build_root(environment: Path, root: Path) -> None:
    """Moves the environment into `root` and adds whatever it needs to run."""
    root.mkdir(parents=True)
    _make_links(root)

    interpreter = Path(sys.executable)  # on Debian a link, which the environment's own link leads to
    _copy(interpreter, root)
    stdlib = _copy_stdlib(root)

    programs = [interpreter, *_elf_files(stdlib), *_elf_files(environment)]
    libraries = _linked_libraries(programs, environment)
    for path in libraries:
        _copy(path, root)

    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    for path in (*map(Path, FILES), certificates):
        if path.exists():
            _copy(path, root)
    default = root / "usr/lib/ssl/cert.pem"  # where OpenSSL of Debian looks
    default.parent.mkdir(parents=True, exist_ok=True)
    default.symlink_to(certificates)

    _write_fixed_files(root)
    _record_packages([interpreter, *stdlib.glob("*.py"), *libraries], root)
    _move(environment, root)


def _make_links(root: Path) -> None:
    """/lib and its like as links into /usr, as the base has them."""
    for name in ("bin", "lib", "lib64", "sbin"):
        link = Path("/", name)
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            (root / name).symlink_to(f"usr/{name}")


def _place(path: Path, root: Path) -> Path:
    """Path below `root` of a file of the base. Its folders become real ones, without links that lead out."""
    parent = path.parent.resolve()
    return root / str(parent).lstrip("/") / path.name


def _copy(path: Path, root: Path) -> None:
    """Copies a file; for a link also whatever it points at."""
    target = _place(path, root)
    if os.path.lexists(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, target, follow_symlinks=False)
    if path.is_symlink():
        _copy(path.parent / path.readlink(), root)


def _copy_stdlib(root: Path) -> Path:
    """Copies Python's standard library without what no program here uses; returns the base's folder."""
    folder = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    ignore = shutil.ignore_patterns(*UNUSED_STDLIB, *UNUSED_PATTERNS)
    copy = root / str(folder).lstrip("/")
    shutil.copytree(folder, copy, ignore=ignore, symlinks=False, ignore_dangling_symlinks=True)
    compile_modules(copy, root)
    open_to_group_0(copy)
    return folder


def _elf_files(folder: Path) -> list[Path]:
    """Shared libraries and programs below a folder, in order."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and (".so" in path.name or os.access(path, os.X_OK)):
            with path.open("rb") as file:
                if file.read(4) == ELF:
                    found.append(path)
    return found


def _linked_libraries(programs: Iterable[Path], environment: Path) -> list[Path]:
    """Libraries of the base that programs are linked to, as the loader finds them; and the loader itself."""
    found: set[Path] = {LOADER}
    for program in programs:
        environ = {"LD_TRACE_LOADED_OBJECTS": "1"}
        traced = subprocess.run([LOADER, program], env=environ, capture_output=True, text=True, check=False)
        found |= {Path(path) for path in re.findall(r"=> (/\S+)", traced.stdout)}

    folder = Path("/usr/lib/x86_64-linux-gnu")
    found |= {folder / name for name in OPENED_BY_NAME if (folder / name).exists()}
    return sorted(path for path in found if environment not in path.parents)


def _write_fixed_files(root: Path) -> None:
    for name, text in WRITTEN.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("tmp", "var/tmp"):
        (root / name).mkdir(parents=True)
        (root / name).chmod(0o1777)
    for name in ("proc", "sys", "dev", "etc/finetune"):
        (root / name).mkdir(exist_ok=True)


def _record_packages(files: Iterable[Path], root: Path) -> None:
    """Writes which Debian packages files came from, where scanners look for it in images without dpkg."""
    names = sorted({name for path in files for name in (str(path), str(path.resolve()), str(path.resolve())[4:])})
    asked = subprocess.run(["dpkg-query", "-S", *names], capture_output=True, text=True, check=False)
    lines = [line for line in asked.stdout.splitlines() if not line.startswith("diversion by ")]  # Ubuntu's libc6
    packages = sorted({line.split(":")[0] for line in lines} | {"ca-certificates"})

    folder = root / "var/lib/dpkg/status.d"
    folder.mkdir(parents=True)
    for package in packages:
        status = subprocess.run(["dpkg-query", "-s", package], capture_output=True, text=True, check=True)
        (folder / package).write_text(status.stdout)


def _move(environment: Path, root: Path) -> None:
    target = root / str(environment).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(environment, target)


if __name__ == "__main__":
    build_root(Path(sys.argv[1]), Path(sys.argv[2]))
