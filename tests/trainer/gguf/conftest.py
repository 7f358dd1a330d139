"""Models of every family, made once, and our exporter as a function."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune_devcluster.family_models import make_family_model
from finetune_trainer.export.export import ExportRequest, export

FamilyBase = Callable[[str], Path]
ExportGguf = Callable[..., dict[str, Path]]


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
