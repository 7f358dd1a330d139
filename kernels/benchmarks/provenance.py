"""The origin of figures: the commit and the package versions that were measured."""

import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "bitsandbytes",
    "unsloth",
    "liger-kernel",
    "fla-core",
    "flash-attn-4",
)


def installed_versions(packages: Sequence[str] = PACKAGES) -> str:
    """Returns the versions of those of the packages that are installed."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name).partition('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def current_commit() -> str:
    """Returns the checkout's commit, with a plus sign if files differ from it; "unknown" outside a checkout."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "unknown"
    return described.stdout.strip()
