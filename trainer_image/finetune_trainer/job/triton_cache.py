"""Fills a pod's Triton cache with what the image has compiled already: the module that calls CUDA's driver.

Triton compiles that module by gcc at its first kernel, and the image has no compiler. The cache itself cannot lie in
the image, because Triton writes into it and a pod's root file system is read-only.
"""

import shutil
from pathlib import Path


def seed_triton_cache(seed: Path | None, cache: Path | None) -> int:
    """Copies the files of `seed` that `cache` lacks; returns their number. Does nothing where a machine has neither
    (a run outside the image). Raises OSError if the cache cannot be written."""
    if seed is None or cache is None or not seed.is_dir():
        return 0

    copied = 0
    for path in sorted(seed.rglob("*")):
        target = cache / path.relative_to(seed)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            copied += 1
    return copied
