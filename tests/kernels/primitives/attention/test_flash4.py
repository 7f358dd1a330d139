"""When FlashAttention 4 is taken, what it is asked for, and, where its package is, that it compiles for a Hopper."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_kernels.primitives.attention import flash4
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv

PROJECT = Path(__file__).parents[4] / "pyproject.toml"
SEQUENCES = PackedSequences.of_length(64, 2, torch.device("cpu"))


def qkv(size: int = 64, dtype: torch.dtype = torch.bfloat16) -> Qkv:
    return Qkv(*(torch.zeros(128, heads, size, dtype=dtype) for heads in (4, 2, 2)))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4, "is_hopper", lambda device: True)
    monkeypatch.setattr(flash4, "is_installed", lambda: True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("size", flash4.HEAD_SIZES)
@pytest.mark.parametrize(
    "params", [AttentionParams(1.0), AttentionParams(1.0, 16, sinks=torch.zeros(4)), AttentionParams(1.0, 16, 50.0)]
)
def test_it_takes_heads_windows_and_sinks(size: int, params: AttentionParams) -> None:
    assert flash4.takes(qkv(size), SEQUENCES, params)


@pytest.mark.usefixtures("hopper")
def test_it_leaves_what_it_cannot_compute() -> None:
    plain = AttentionParams(1.0)
    for size in (8, 68, 80, 112, 264):
        assert not flash4.takes(qkv(size), SEQUENCES, plain)
    assert not flash4.takes(qkv(dtype=torch.float32), SEQUENCES, plain)
    many = PackedSequences.of_length(1, flash4.MAX_SEQUENCES + 1, torch.device("cpu"))
    assert not flash4.takes(qkv(), many, plain)


def test_it_is_for_hopper_and_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not flash4.is_hopper(torch.device("cpu"))
    for capability, expected in (((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert flash4.is_hopper(torch.device("cuda", 0)) is expected

    for found, expected in ((flash4.VERSION, True), ("4.0.0", False)):
        monkeypatch.setattr(flash4, "version", lambda name, found=found: found)
        assert flash4.is_installed.__wrapped__() is expected
    assert not flash4.takes(qkv(), SEQUENCES, AttentionParams(1.0)), "there is no such card here"


def test_the_extra_brings_the_version_that_is_used() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    assert project["optional-dependencies"]["hopper"] == [f"flash-attn-4[cu13]=={flash4.VERSION}"]


def test_both_directions_see_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def note(*tensors: torch.Tensor, **options: Any) -> tuple[Any, ...]:
        asked.append(options)
        return (*tensors[:3], None)

    module = SimpleNamespace(_flash_attn_fwd=note, _flash_attn_bwd=note)
    monkeypatch.setattr(flash4, "_interface", lambda: module)
    for window, left, cap in ((None, None, None), (16, 15, None), (64, None, 50.0)):
        params = AttentionParams(0.125, window, cap)
        out, saved = flash4.forward(qkv(), SEQUENCES, params)
        flash4.backward(out, qkv(), out, saved, SEQUENCES, params)

        forward, backward = asked[-2:]
        assert forward.pop("return_lse")
        assert forward == backward
        assert (forward["causal"], forward["window_size_left"], forward["softmax_scale"]) == (True, left, 0.125)
        assert (forward["max_seqlen_q"], forward["softcap"]) == (64, cap or 0.0)


COMPILES = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from finetune_kernels.primitives.attention import flash4
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv

with FakeTensorMode():
    whole = torch.empty(4096, 12, 128, device="cuda", dtype=torch.bfloat16)
    qkv, ends = Qkv(*whole.split([8, 2, 2], dim=1)), torch.empty(6, device="cuda", dtype=torch.int32)
    sequences, params = PackedSequences(ends, 2048, 4096), AttentionParams(0.1, 512, 50.0)
    out, saved = flash4.forward(qkv, sequences, params)
    gradients = flash4.backward(torch.empty_like(out), qkv, out, saved, sequences, params)
    assert saved[0].shape == (8, 4096) and saved[0].dtype == torch.float32
    assert [one.shape for one in gradients] == [one.shape for one in qkv]
"""


@pytest.mark.skipif(not flash4.is_installed(), reason=f"flash-attn-4 {flash4.VERSION} is not installed")
def test_it_compiles_for_a_hopper_without_a_gpu() -> None:
    target = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPILES], env=os.environ | target, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "aux_data" not in done.stderr
