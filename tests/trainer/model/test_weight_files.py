"""All weight files of a model together: what is missing, broke off or differs from the index is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune_trainer.errors import TrainerError
from finetune_trainer.model.weight_files import INDEX_NAME, list_weights_below

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PLACED = {"a.weight": FIRST, "b.weight": SECOND, "c.weight": SECOND}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A model in two files."""
    for file in (FIRST, SECOND):
        names = [name for name, place in PLACED.items() if place == file]
        save_file({name: torch.ones(2, 3) for name in names}, tmp_path / file)
    write_index(tmp_path, PLACED)
    return tmp_path


def write_index(folder: Path, placed: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def cut(folder: Path) -> None:
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[:-4])


def repeat(folder: Path) -> None:
    save_file({"a.weight": torch.ones(2, 3)}, folder / FIRST)
    save_file({"a.weight": torch.ones(2, 3)}, folder / SECOND)


def test_two_files_are_read(shards: Path) -> None:
    assert {tensor.name: tensor.file for tensor in list_weights_below(shards)} == PLACED


def test_one_file_is_read_without_an_index(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    save_file({"other": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    assert [tensor.name for tensor in list_weights_below(tmp_path)] == ["a.weight"]


def test_causal_masks_of_old_files_are_no_weights(tmp_path: Path) -> None:
    masks = {"a.attention.bias": torch.ones(1, 1, 4, 4).bool(), "b.attn.bias": torch.ones(1, 1, 4, 4).byte()}
    others = {"c.bias": torch.ones(4).byte(), "d.mask": torch.ones(1, 1, 4, 4).bool(), "e.bias": torch.ones(1, 1, 4, 4)}
    save_file(masks | others, tmp_path / "model.safetensors")
    assert {tensor.name for tensor in list_weights_below(tmp_path)} == set(others)


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a missing shard": (lambda folder: (folder / SECOND).unlink(), "ModelNotFound", f"names {SECOND}, which"),
    "a shard that broke off": (cut, "InvalidConfiguration", f"{SECOND} broke off"),
    "no index": (lambda folder: (folder / INDEX_NAME).unlink(), "ModelNotFound", "neither model.safetensors nor"),
    "a tensor that is nowhere": (
        lambda folder: write_index(folder, {**PLACED, "d.weight": FIRST}),
        "InvalidConfiguration",
        "that its files lack: d.weight",
    ),
    "a tensor in two files": (repeat, "InvalidConfiguration", f"both {FIRST} and {SECOND} hold a.weight"),
    "an index without files": (lambda folder: write_index(folder, ["a"]), "InvalidConfiguration", "no weight_map"),
    "an index that is cut": (
        lambda folder: (folder / INDEX_NAME).write_text("{"),
        "InvalidConfiguration",
        "not valid JSON",
    ),
    "an index that leads out": (
        lambda folder: write_index(folder, {"a": "../x.safetensors"}),
        "ModelNotFound",
        "../x.safetensors",
    ),
    "two models in one folder": (
        lambda folder: save_file({"a.weight": torch.ones(2, 3)}, folder / "model.safetensors"),
        "InvalidConfiguration",
        "remove one of them",
    ),
}


@pytest.mark.parametrize(("fault", "reason", "part"), FAULTS.values(), ids=FAULTS)
def test_a_fault_has_a_name(shards: Path, fault: Callable[[Path], object], reason: str, part: str) -> None:
    fault(shards)
    with pytest.raises(TrainerError) as refusal:
        list_weights_below(shards)
    assert refusal.value.reason == reason
    assert part in refusal.value.message
