"""The header of a safetensors file against the safetensors package, and damage in every place of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finetune_trainer.errors import TrainerError
from finetune_trainer.model.safetensors_header import FIRST_BYTES, TensorHeader, read_header

WEIGHTS = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "b.weight": torch.ones(5, dtype=torch.float32),
    "codes": torch.arange(7, dtype=torch.uint8),
    "empty": torch.zeros(0, 3, dtype=torch.float16),
    "scalar": torch.tensor(2.0, dtype=torch.float64),
}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    save_file(WEIGHTS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


class Reads:
    """A file's content, and the ranges that were read of it."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.ranges: list[tuple[int, int]] = []

    def __call__(self, start: int, end: int) -> bytes:
        self.ranges.append((start, end))
        return self.content[start:end]


def headers(content: bytes) -> list[TensorHeader]:
    return read_header("model.safetensors", len(content), Reads(content))


def test_says_what_the_package_says(stored: Path) -> None:
    content = stored.read_bytes()
    found = {header.name: header for header in headers(content)}
    assert found.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        header = found[name]
        raw = bytes(weight.reshape(-1).view(torch.uint8).numpy()) if weight.numel() else b""
        assert (header.shape, content[header.start : header.end]) == (tuple(weight.shape), raw)
    assert (found["a.weight"].dtype, found["a.weight"].parameters) == ("BF16", 12)


def test_reads_once_and_a_long_header_twice() -> None:
    small, long = (
        b"".join([len(text).to_bytes(8, "little"), text, bytes(2 * count)])
        for count in (1, 3000)
        for text in [
            json.dumps(
                {f"layer.{n}": {"dtype": "F16", "shape": [1], "data_offsets": [2 * n, 2 * n + 2]} for n in range(count)}
            ).encode()
        ]
    )
    for content, count, ranges in ((small, 1, 1), (long, 3000, 2)):
        reads = Reads(content)
        assert len(read_header("x", len(content), reads)) == count
        assert len(reads.ranges) == ranges
    assert len(long) > FIRST_BYTES


def change(edit: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Rewrites the header, not the data."""

    def damage(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        text = json.dumps(edit(header) or header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return damage


def put(**fields: Any) -> Callable[[bytes], bytes]:
    return change(lambda header: header["a.weight"].update(fields))


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "the last byte is missing": (lambda content: content[:-1], "broke off"),
    "half of it is missing": (lambda content: content[: len(content) // 2], "broke off"),
    "it ends in the header": (lambda content: content[:30], "its header alone needs"),
    "nothing is there": (lambda _: b"", "not a safetensors file"),
    "a page of a proxy": (lambda _: b"<!DOCTYPE html><html>" * 20, "not a safetensors file"),
    "a Git LFS pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1", "not a safetensors file"),
    "more bytes than it names": (lambda content: content + b"\0", "1 bytes follow"),
    "a header that is no JSON": (lambda content: content[:8] + b"x" + content[9:], "damaged safetensors header"),
    "a header that is a list": (change(lambda _: [1]), "no JSON object"),
    "an unknown type": (put(dtype="F7"), "stored as F7"),
    "another shape": (put(shape=[3, 5]), "a.weight does not have the bytes"),
    "a negative shape": (put(shape=[-3, -4]), "a.weight does not have the bytes"),
    "a tensor twice": (change(lambda header: header.update(twin=header["a.weight"])), "share bytes"),
    "a tensor left out": (change(lambda header: header.pop("a.weight") and None), "nothing names the bytes"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_refuses_what_the_package_refuses(
    stored: Path, damage: Callable[[bytes], bytes], reason: str, tmp_path: Path
) -> None:
    damaged = damage(stored.read_bytes())
    with pytest.raises(TrainerError, match=reason) as refusal:
        headers(damaged)
    assert refusal.value.reason == "InvalidConfiguration"
    assert "model.safetensors" in refusal.value.message

    copy = tmp_path / "damaged.safetensors"
    copy.write_bytes(damaged)
    with pytest.raises((SafetensorError, OSError)), safe_open(copy, "pt"):
        pass
