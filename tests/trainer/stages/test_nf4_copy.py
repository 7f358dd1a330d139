"""The copy of a base model in NF4: to the byte what a fresh load gives, and not used if it could be anything else."""

import errno
import json
import logging
import os
import shutil
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file

from finetune_api.outcome import Result
from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision
from finetune_test_models.tiny_model import make_tiny_model
from finetune_test_models.tiny_runs import Builder
from finetune_trainer.cli.pod import run_job
from finetune_trainer.export.tensor_io import checked_tensors
from finetune_trainer.export.tensor_io.checked_tensors import open_checked, write_checked
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.sources import SourceAccess, fetch_model
from finetune_trainer.stages import model_loading, nf4_copy
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.nf4_copy import Nf4Copies
from finetune_trainer.stages.streamed_loading import Share
from finetune_trainer.storage.object_store import ignore_bytes
from finetune_trainer.training.loaded_model import LoadedModel

DIGEST, CPU = "a" * 64, torch.device("cpu")
TOKENS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def copies(tmp_path: Path) -> Nf4Copies:
    return Nf4Copies(tmp_path / "nf4", DIGEST)


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def spec(folder: Path, **fields: Any) -> ModelSpec:
    source = {"source": f"file://{folder}", "maxSequenceLength": 128, "quantization": "NF4"}
    return ModelSpec.model_validate(source | fields)


def load(folder: Path, copies: Nf4Copies | None, precision: Precision = Precision.FP32, **fields: Any) -> LoadedModel:
    return load_model(folder, spec(folder, **fields), precision, gpus=0, copies=copies)


def everything(loaded: LoadedModel) -> dict[str, Any]:
    """All that a model consists of: tensors as their bytes, quantisation states, modules and settings."""
    model = loaded.model
    found: dict[str, Any] = {"config": model.config.to_dict(), "generation": model.generation_config.to_dict()}
    found |= {"path": model.name_or_path, "bytes": loaded.base_bytes, "4 bits": model.is_loaded_in_4bit}
    for name, module in model.named_modules():
        found[name] = type(module).__name__, module.training
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        settings = {key: str(each) for key, each in vars(value).items() if key not in ("quant_state", "module")}
        found[name] = data, value.dtype, tuple(value.shape), type(value).__name__, value.requires_grad, settings
        state = getattr(value, "quant_state", None)
        if state is not None:
            packed = state.as_dict(packed=True)
            found[f"{name} state"] = {key: (each.dtype, each.numpy().tobytes()) for key, each in packed.items()}
            found[f"{name} offset"] = state.offset, state.dtype, state.shape
    return found


@pytest.mark.parametrize(
    ("family", "precision", "fields"),
    [
        ("llama", Precision.FP32, {}),
        ("llama", Precision.BF16, {"doubleQuantization": False}),
        ("gemma3", Precision.BF16, {}),  # a tied head, an embedding that scales
        ("phi3", Precision.FP32, {}),
    ],
)
def test_a_copy_is_to_the_byte_what_a_fresh_load_is(
    family: str, precision: Precision, fields: dict[str, Any], copies: Nf4Copies, tmp_path: Path, texts: list[str],
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    base = make_tiny_model(tmp_path / "base", family=family, texts=texts)
    fresh, first = load(base, None, precision, **fields), load(base, copies, precision, **fields)
    assert "kept a copy of the base model in NF4" in said.text

    monkeypatch.setattr(model_loading._Weights, "_load_files", lambda self: pytest.fail("the shards are read"))
    second = load(base, copies, precision, **fields)
    assert everything(first) == everything(second) == everything(fresh)
    assert sum(isinstance(module, Linear4bit) for module in second.model.modules()) >= 8
    with torch.no_grad():
        assert torch.equal(second.model(TOKENS).logits, fresh.model(TOKENS).logits)
    assert "loaded the base model from its NF4 copy" in said.text


def test_a_rank_that_keeps_a_part_takes_it_from_the_copy(
    tiny_base: Path, copies: Nf4Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(copies: Nf4Copies | None) -> LoadedModel:
        share = Share(1, 2)
        return load_model(tiny_base, spec(tiny_base), Precision.FP32, gpus=0, placement=share, copies=copies)

    fresh = part(copies)
    assert not copies.folder.exists(), "a part is not a copy"
    load(tiny_base, copies)
    monkeypatch.setattr(model_loading._Weights, "_load_files", lambda self: pytest.fail("the shards are read"))
    found = part(copies)
    assert fresh.window is not None
    assert found.window is not None
    assert found.base_bytes == fresh.base_bytes
    for ours, theirs in zip(found.window._layers, fresh.window._layers, strict=True):
        assert torch.equal(ours._shard, theirs._shard)


def only(copies: Nf4Copies) -> Path:
    (path,) = copies.folder.iterdir()
    return path


def damage(path: Path, where: str) -> None:
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    places = {
        "header": header // 2,
        "a weight": header + 100,
        "the middle": len(data) // 2,
        "checksums": len(data) - 20,
    }
    if where == "the end is missing":
        data = data[:-1000]
    elif where == "empty":
        data = bytearray()
    else:
        data[places[where]] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("where", ["header", "a weight", "the middle", "checksums", "the end is missing", "empty"])
def test_a_damaged_copy_is_not_used_and_is_written_anew(
    where: str, tiny_base: Path, copies: Nf4Copies, said: pytest.LogCaptureFixture
) -> None:
    fresh = everything(load(tiny_base, copies))
    whole = only(copies).read_bytes()
    damage(only(copies), where)
    said.clear()
    assert everything(load(tiny_base, copies)) == fresh
    assert "is not used" in said.text
    assert "the model is loaded from its own files" in said.text
    assert only(copies).read_bytes() == whole, "the next job has it again"


def test_another_base_of_the_same_name_has_another_copy(
    tiny_base: Path, copies: Nf4Copies, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    before = everything(load(base, copies))
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 0.5
    save_file(weights, base / "model.safetensors", {"format": "pt"})

    others = replace(copies, model_digest="b" * 64)
    after = everything(load(base, others))
    assert after != before
    assert after == everything(load(base, None))
    assert len(list(copies.folder.iterdir())) == 2

    # Neither is a file of the right name that is about the other model.
    first, second = (
        each.copy_of(model_loading._quantization_config(base, spec(base), torch.float32), torch.float32, CPU)
        for each in (copies, others)
    )
    assert first is not None
    assert second is not None
    shutil.copy(first.path, second.path)
    said.clear()
    assert everything(load(base, others)) == after
    assert "it is about something else" in said.text


def test_everything_that_the_bytes_depend_on_is_in_the_name(
    tiny_base: Path, copies: Nf4Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(copies: Nf4Copies = copies, dtype: torch.dtype = torch.float32, device: str = "cpu", **fields: Any) -> str:
        settings = model_loading._quantization_config(tiny_base, spec(tiny_base, **fields), dtype)
        copy = copies.copy_of(settings, dtype, torch.device(device))
        assert copy is not None
        return copy.path.name

    names = {
        name(), name(replace(copies, model_digest="b" * 64)), name(dtype=torch.bfloat16), name(device="cuda"),
        name(doubleQuantization=False),
    }  # fmt: skip
    assert name() in names
    for library in nf4_copy.LIBRARIES:
        monkeypatch.setattr(nf4_copy, "version", lambda asked, own=library: "9" if asked == own else "1")
        names.add(name())
    monkeypatch.setattr(nf4_copy, "FORMAT", "2")
    names.add(name())
    assert len(names) == 8
    assert copies.copy_of(None, torch.float32, CPU) is None, "weights in 16 bits"


def test_a_copy_of_other_tensors_is_not_used(
    tiny_base: Path, copies: Nf4Copies, said: pytest.LogCaptureFixture
) -> None:
    """As after a change of the code that names them: transformers would make up what is missing."""
    fresh = everything(load(tiny_base, copies))
    path = only(copies)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = {name: each[...] for name, each in open_checked(path, header["__metadata__"]).items()}
    name = "model.layers.1.mlp.up_proj.weight.absmax"
    for changed in (
        {"model.norm.weight": None},
        {"model.norm.weight": None, "model.norm.other": torch.ones(256)},
        {name: None},
    ):
        left = {key: value for key, value in (tensors | changed).items() if value is not None}
        write_checked(path, left, header["__metadata__"])
        said.clear()
        assert everything(load(tiny_base, copies)) == fresh
        assert "is not used" in said.text


Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_does_not_take_it_costs_the_copy_only(
    tiny_base: Path, copies: Nf4Copies, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    fresh = everything(load(tiny_base, None))
    for number, words in (
        (errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot be written or read: Read-only file system"),
        (errno.EIO, "Input/output error"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", lambda self, target, number=number: refuse(self, number))
            said.clear()
            assert everything(load(tiny_base, copies)) == fresh
            assert "no NF4 copy of the base model is kept: " in said.text
            assert words in said.text
        assert list(copies.folder.iterdir()) == [], "nothing is left"

    with monkeypatch.context() as patch:
        patch.setattr(nf4_copy.shutil, "disk_usage", lambda folder: Usage(10, 9, 1000))
        load(tiny_base, copies)
        assert f"0.0 MiB are free in {copies.folder}" in said.text
        assert list(copies.folder.iterdir()) == []
    load(tiny_base, copies)
    assert only(copies), "with room it is kept"


def refuse(path: Path, number: int) -> None:
    raise OSError(number, os.strerror(number), str(path))


def test_a_copy_is_kept_by_one_process_of_a_run(tiny_base: Path, copies: Nf4Copies) -> None:
    load(tiny_base, replace(copies, makes=False))
    assert not copies.folder.exists()


def test_what_killed_writers_left_is_removed_after_a_day(tiny_base: Path, copies: Nf4Copies) -> None:
    copies.folder.mkdir()
    old, new = (copies.folder / f"{name}{checked_tensors.UNFINISHED}" for name in ("old", "new"))
    for path, age in ((old, 2 * 86_400), (new, 3600)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    load(tiny_base, copies)
    assert not old.exists()
    assert new.exists(), "its writer may still be at it"


def test_a_run_keeps_the_copy_by_the_digest_of_what_it_fetched(
    tiny_base: Path, run_config: Builder, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "nf4"
    settings = Settings(tmp_path / "work", "a", output_folder=tmp_path / "out", nf4_cache=cache)
    config = run_config(training={"maxSteps": 1, "precision": "FP32"})
    outcome = run_job(config, settings, ProgressTracker(), StopSignal())
    assert outcome.result is Result.SUCCEEDED, outcome.message

    fetched = fetch_model(config.model.source, None, tmp_path / "again", SourceAccess(), ignore_bytes)
    copies = Nf4Copies(cache, fetched.digest)
    quantization = model_loading._quantization_config(tiny_base, config.model, torch.float32)
    copy = copies.copy_of(quantization, torch.float32, CPU)
    assert copy is not None
    assert only(copies) == copy.path
    assert copy.load(tiny_base, CPU, torch.float32) is not None


def test_a_pod_says_where_copies_are_kept(tmp_path: Path) -> None:
    variables = {"FINETUNE_WORK_DIR": "/workspace", "FINETUNE_ATTEMPT_ID": "1", "FINETUNE_CONFIG": "/config"}
    assert Settings.from_environment(variables).nf4_cache is None
    assert Nf4Copies.within(None, DIGEST) is None
    settings = Settings.from_environment(variables | {"FINETUNE_NF4_CACHE": "/cache/nf4"})
    assert Nf4Copies.within(settings.nf4_cache, DIGEST) == Nf4Copies(Path("/cache/nf4"), DIGEST)
