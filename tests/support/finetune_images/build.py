"""`make images`: builds both images on this machine, without a registry, and says how large they are.

python -m finetune_images.build                       both images
python -m finetune_images.build --twice operator      one image, twice: its digest must be the same
"""

import argparse
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from finetune_images.local_store import CACHE, CHECKOUT, build, buildah, mounted
from finetune_images.sbom import write_sbom

VERSION = str(tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"])


@dataclass(frozen=True)
class Image:
    """One of the two images."""

    name: str
    dockerfile: str
    largest_bytes: int
    """Its files may have as many bytes."""

    @property
    def tag(self) -> str:
        """Name in this machine's store, as the chart would have it below a registry `localhost`."""
        return f"localhost/{self.name}:{VERSION}"

    @property
    def sbom(self) -> Path:
        """Its bill of materials."""
        return CACHE / f"{self.name}-{VERSION}.cdx.json"


IMAGES = {
    "operator": Image("finetune-operator", "operator/Dockerfile", 150_000_000),
    "trainer": Image("finetune-trainer", "trainer_image/Dockerfile", 5_000_000_000),
}


def bytes_of(root: Path) -> int:
    """Bytes of all files below a folder; a file with several names counts once."""
    found = {}
    for path in root.rglob("*"):
        status = path.lstat()
        if path.is_file() and not path.is_symlink():
            found[status.st_ino] = status.st_size
    return sum(found.values())


def revision() -> str:
    """Commit of the checkout, marked if it has changes."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def build_image(image: Image, commit: str) -> str:
    """Builds one image, checks its size, and returns its digest. `commit`: what the image says that it was made of."""
    start = time.monotonic()
    digest = build(image.dockerfile, image.tag, {"VERSION": VERSION, "REVISION": commit})
    seconds = time.monotonic() - start

    with mounted(image.tag) as root:
        size = bytes_of(root)
        parts = write_sbom(root, image.name, VERSION, digest, image.sbom)
    print(f"{image.tag}  {digest}  {size / 1e6:,.0f} MB unpacked  built in {seconds:.0f} s", flush=True)
    print(f"{image.sbom}  {parts} components", flush=True)
    if size > image.largest_bytes:
        sys.exit(f"{image.tag} has {size:,} bytes; it may have {image.largest_bytes:,}: find what has grown")
    return digest


def main() -> None:
    """Builds the images of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="*", choices=[[], *IMAGES], default=[], help="default: both")
    parser.add_argument("--twice", action="store_true", help="build again, and fail if the digest differs")
    options = parser.parse_args()

    CACHE.mkdir(parents=True, exist_ok=True)
    commit = revision()
    for name in options.images or IMAGES:
        image = IMAGES[name]
        digest = build_image(image, commit)
        if options.twice and (again := build_image(image, commit)) != digest:
            sys.exit(f"{image.tag} was built twice from one source and has two digests: {digest} and {again}")
    buildah("rmi", "--prune", capture=True)  # what older builds have left


if __name__ == "__main__":
    main()
