"""fla's norms keep one configuration, by stand-ins for fla's modules; an autotuner's are compiled side by side."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from finetune_kernels.mixers import tuning
from finetune_kernels.mixers.tuning import NORMS, pin_norms

BLOCKS = [(rows, warps) for rows in (16, 32, 64) for warps in (4, 8)]


def fake_kernel(blocks: list[tuple[int, int]]) -> Any:
    """A kernel below heuristics and an autotuner."""
    configs = [SimpleNamespace(kwargs={"BT": rows}, num_warps=warps) for rows, warps in blocks]
    return SimpleNamespace(fn=SimpleNamespace(configs=configs, fn=None))


def put_modules(monkeypatch: pytest.MonkeyPatch, blocks: list[tuple[int, int]]) -> list[Any]:
    modules = {path: ModuleType(path) for path in NORMS}
    kernels = []
    for path, names in NORMS.items():
        for name in names:
            kernels.append(fake_kernel(blocks))
            setattr(modules[path], name, kernels[-1])
    monkeypatch.setattr(tuning, "import_module", modules.__getitem__)
    return kernels


def test_one_configuration_is_left_and_a_second_call_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = put_modules(monkeypatch, BLOCKS)
    for _ in range(2):
        pin_norms()
        left = [[(one.kwargs["BT"], one.num_warps) for one in kernel.fn.configs] for kernel in kernels]
        assert left == [[(32, 4)]] * 4


def test_kernels_of_another_version_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    put_modules(monkeypatch, [(8, 4), (64, 8)])
    with pytest.raises(ValueError, match="l2norm_fwd_kernel has 0 configurations of 32 rows, not one"):
        pin_norms()


TUNED = '''
"""Tunes a kernel twice, up to the first trial, for a Hopper that is not there. Prints how many kernels there
were then, how those failed that did, how many compilations there were, and whether this thread made any."""

import json
import logging
import sys
import threading

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner

from finetune_kernels.mixers.tuning import compile_side_by_side

SIZES = [triton.Config({"SIZE": size}, num_warps=warps) for size in (8, 32, 64) for warps in (4, 8)]


class Hopper:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda *_: GPUTarget("cuda", 90, 32)


@triton.autotune(SIZES, ["rows"])
@triton.jit
def product(x_ptr, rows, SIZE: tl.constexpr):
    tl.static_assert(SIZE >= 32)
    places = tl.arange(0, SIZE)
    x = tl.load(x_ptr + places[:, None] * rows + places[None, :])
    tl.store(x_ptr + places[:, None] * rows + places[None, :], tl.dot(x, x).to(tl.bfloat16))


class Tried(Exception):
    pass


def try_out(*_, **__):
    raise Tried


def note(*arguments, **options):
    threads.append(threading.get_ident())
    return compile_kernel(*arguments, **options)


logging.basicConfig(level=logging.INFO)
driver.set_active(Hopper())
threads, compile_kernel = [], triton.compiler.compile
triton.compiler.compile, Autotuner._bench = note, try_out
if "alone" not in sys.argv:
    compile_side_by_side()
    compile_side_by_side()
for _ in range(2):
    try:
        product[(1,)](torch.zeros(64, 64, dtype=torch.bfloat16), 64)
    except Tried:
        caches = product.fn.device_caches
        kernels = list(caches[0][0].values()) if 0 in caches else []
        failed = [type(kernel.future.exception()).__name__ for kernel in kernels if "future" in vars(kernel)]
        print(json.dumps([len(kernels), failed, len(threads), threading.get_ident() in threads]))
'''


def tuned(folder: Path, *arguments: str) -> list[list[Any]]:
    folder.mkdir()
    (folder / "tuned.py").write_text(TUNED)
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-P", str(folder / "tuned.py"), *arguments], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("kernels are compiled before the first step") == (not arguments), "said once"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_configurations_are_compiled_in_other_threads_before_one_is_tried(tmp_path: Path) -> None:
    refused = ["CompileTimeAssertionFailure"] * 2  # which an autotuner takes for the slowest
    assert tuned(tmp_path / "together") == [[6, refused, 6, False]] * 2


def test_by_itself_triton_compiles_what_it_tries(tmp_path: Path) -> None:
    assert tuned(tmp_path / "alone", "alone")[0][0] == 0
