"""fla's norms keep one configuration, by stand-ins for fla's modules."""

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
