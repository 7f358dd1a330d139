"""Models of every family, made once, our exporter as a function, and conversions that are wrong in one way each."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_test_models.family_models import make_family_model
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.export.gguf import files, tensors
from finetune_trainer.export.gguf.families.table import GGUF_FAMILIES
from finetune_trainer.export.gguf.rope import factors

FamilyBase = Callable[[str], Path]
ExportGguf = Callable[..., dict[str, Path]]
Spoil = Callable[[str], None]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and lose much where other processes run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def family_base(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> FamilyBase:
    """The model folder of a family, by its name."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = make_family_model(name, tmp_path_factory.mktemp(name) / "base", texts)
        return made[name]

    return find


@pytest.fixture(scope="session")
def export_gguf() -> ExportGguf:
    """Our GGUF files of a model folder, by type."""

    def write(base: Path, output: Path, *kinds: str) -> dict[str, Path]:
        request = ExportRequest(base=base, adapter=None, output=output, merged=None, gguf=kinds, name="tiny")
        files = export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
        return {file.type: file.path for file in files}

    return write


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Make our conversion wrong in the named way."""
    gemma = dataclasses.replace(GGUF_FAMILIES["gemma3_text"], norm_offset=0)

    def swapped(config: dict[str, Any]) -> dict[str, torch.Tensor]:
        found = factors.rope_factor_tensors(config)
        return dict(zip(found, reversed(found.values()), strict=True))

    ways: dict[str, Callable[[], None]] = {
        "q and k in Hugging Face's order": lambda: monkeypatch.setattr(
            tensors, "interleave_heads", lambda weights, heads: weights
        ),
        "norms around zero": lambda: monkeypatch.setitem(GGUF_FAMILIES, "gemma3_text", gemma),
        "no divisors of RoPE": lambda: monkeypatch.setattr(
            factors, "_llama3_factors", lambda scaling, dimensions: torch.ones(dimensions // 2)
        ),
        "long and short divisors swapped": lambda: monkeypatch.setattr(files, "rope_factor_tensors", swapped),
    }
    return lambda way: ways[way]()
