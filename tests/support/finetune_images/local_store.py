"""Images on a machine without a registry: a base of the same Python from Debian's packages, and buildah's own store.

Everything lies below the cache, so that `buildah` of this machine's user never meets it. Needs root, mmdebstrap and
buildah. Where pip finds packages is this machine's business: its configuration is mounted into the build, and nothing
of it stays in an image.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).parents[3]
CACHE = Path(os.environ.get("CACHE") or Path.home() / ".cache/finetune-operator") / "images"
BASE = "localhost/python:3.11-bookworm"
BASE_PACKAGES = ("python3", "python3-venv", "libpython3.11-dev", "ca-certificates")
"""Python with headers and pip, as the official image python:3.11-slim-bookworm has them."""

CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
TIMESTAMP = "1767225600"
"""Time of every file and image, 2026-01-01: two builds of one source give one digest."""


def buildah(*arguments: str | Path, capture: bool = False) -> str:
    """Runs buildah with the store of this cache; returns what it printed if `capture`."""
    for program in ("buildah", "mmdebstrap"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is not installed: on Debian, `apt-get install buildah mmdebstrap`")
    command: list[str | Path] = [
        "buildah",
        "--root",
        CACHE / "store",
        "--runroot",
        CACHE / "run",
        "--storage-driver",
        "overlay",
    ]
    done = subprocess.run([*command, *arguments], check=True, text=True, stdout=subprocess.PIPE if capture else None)
    return (done.stdout or "").strip()


def ensure_base() -> None:
    """Makes the base image if the store has none."""
    if buildah("images", "--quiet", "--filter", f"reference={BASE}", capture=True):
        return
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        archive = Path(folder) / "base.tar"
        options = ["--variant=minbase", f"--include={','.join(BASE_PACKAGES)}"]
        subprocess.run(["mmdebstrap", "--quiet", *options, "bookworm", archive], check=True)
        container = buildah("from", "scratch", capture=True)
        buildah("add", "--quiet", container, archive, "/", capture=True)
        buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", container)
        buildah("commit", "--quiet", "--rm", "--timestamp", TIMESTAMP, container, BASE, capture=True)


@contextmanager
def pip_mounts() -> Iterator[list[str]]:
    """Yields options that mount this machine's pip configuration and certificates into a build."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = value.strip("'")

    given = [settings.get(name, "") for name in ("cert", "find-links", "client-cert")]
    paths = [CERTIFICATES, *(Path(value) for value in given if value.startswith("/") and Path(value).exists())]
    settings["cert"] = settings.get("cert", str(CERTIFICATES))

    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder) / "pip.conf"
        configuration.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        mounts = [f"--volume={path}:{path}:ro" for path in dict.fromkeys(paths)]
        yield [*mounts, f"--volume={configuration}:/etc/pip.conf:ro"]


def build(dockerfile: str, tag: str, arguments: dict[str, str], options: Sequence[str] = ()) -> str:
    """Builds one image from the checkout; returns the digest of its manifest."""
    ensure_base()
    values = [f"--build-arg={name}={value}" for name, value in ({"BASE": BASE} | arguments).items()]
    flags = ["--isolation=chroot", "--network=host", f"--timestamp={TIMESTAMP}", "--no-cache", "--quiet"]
    with pip_mounts() as mounts:
        buildah(
            "bud", *flags, *mounts, *values, *options, f"--file={dockerfile}", f"--tag={tag}", CHECKOUT, capture=True
        )
    return digest_of(tag)


def digest_of(tag: str) -> str:
    """Digest of an image's manifest in the store."""
    return buildah("images", "--format", "{{.Digest}}", tag, capture=True)


@contextmanager
def mounted(tag: str) -> Iterator[Path]:
    """Mounts an image's file system, for reading."""
    container = buildah("from", "--pull-never", tag, capture=True)
    try:
        yield Path(buildah("mount", container, capture=True))
    finally:
        buildah("rm", container, capture=True)
