"""Tuning of fla's kernels: one configuration for those that would be tuned again while a run trains, and the others'
configurations compiled side by side.

fla tries all configurations of a kernel when it is called with a new key, and keeps the fastest: it compiles each, and
takes 256 MB for the trial. Most keys are the model's sizes, so all is tried in the step that every run makes before it
trains: 83 compilations for Qwen 3.5 9B, which Triton makes one after the other, on one of the machine's cores (by 16
cores side by side, that step takes 44 s on an H200's host, and 2 s where Triton's cache has them already). Keys of
the norms count rows as well, in steps of 65,536: of 2,048 tokens with 32 heads. A step with more tokens than any before
it would stop to compile 68 kernels, in memory that is planned to the last gibibyte.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from typing import Any

log = logging.getLogger(__name__)

NORMS = {
    "fla.modules.norm.l2norm": ("l2norm_fwd_kernel", "l2norm_bwd_kernel"),
    "fla.modules.norm.fused_norm_gate": ("layer_norm_gated_fwd_kernel", "layer_norm_gated_bwd_kernel"),
}
"""Module -> its kernels. They read and write each row once, so that configurations matter little."""
ROWS, WARPS = 32, 4
"""Rows of a block, and its warps: 32 of 128 elements are 32 for each thread."""


def pin_norms() -> None:
    """Leaves each of these kernels the one configuration, for the whole process.

    Raises ValueError if a kernel has no such configuration.
    """
    for path, names in NORMS.items():
        for name in names:
            tuner = autotuner_of(getattr(import_module(path), name))
            tuner.configs = [
                config for config in tuner.configs if (config.kwargs.get("BT"), config.num_warps) == (ROWS, WARPS)
            ]
            if len(tuner.configs) != 1:
                raise ValueError(f"{path}.{name} has {len(tuner.configs)} configurations of {ROWS} rows, not one")


def compile_side_by_side() -> None:
    """Makes every autotuner of this process compile the configurations that it is about to try in as many threads as
    there are cores. A second call changes nothing. One that does not compile is left to the autotuner, as before."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs
    if hasattr(prune, "__wrapped__"):
        return

    def prune_and_compile(tuner: Any, options: dict[str, Any]) -> list[Any]:
        configs: list[Any] = prune(tuner, options)
        _say_why_it_takes_long()
        _compile(tuner, configs, options)
        return configs

    prune_and_compile.__wrapped__ = prune  # type: ignore[attr-defined]
    Autotuner.prune_configs = prune_and_compile


@cache
def _say_why_it_takes_long() -> None:
    """Tells people once in a process, as the run stands still meanwhile."""
    cores = len(os.sched_getaffinity(0))
    log.info(
        "linear attention's kernels are compiled before the first step, in all their configurations: 44 s on an "
        "H200's host with 16 cores; here are %d", cores,
    )  # fmt: skip


def _compile(tuner: Any, configs: list[Any], options: dict[str, Any]) -> None:
    """Fills the kernel's cache. Triton lets go of Python's lock while it compiles."""
    from triton import AsyncCompileMode  # not in all versions of Triton that kernels run with

    arguments = tuple(tuner.nargs.values())
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for config in configs:
            tuner.fn.run(*arguments, **options | {"warmup": True}, **config.all_kwargs())


def autotuner_of(kernel: Any) -> Any:
    """Returns a kernel's autotuner, which may lie below heuristics."""
    while not hasattr(kernel, "configs"):
        kernel = kernel.fn
    return kernel
