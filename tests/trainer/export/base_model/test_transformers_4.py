"""Published tokenizers load in transformers 4.57, which refuses what transformers 5 saves."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from finetune_api.spec.inputs import ModelSpec
from finetune_test_models.family_models import make_family_model
from finetune_test_programs.transformers_4 import read_folders
from finetune_trainer.export.base_model.companions import companions_of_training
from finetune_trainer.export.export import ExportRequest, export

FAMILIES = ("llama-3.1", "qwen2.5", "gemma-2", "phi-4-mini")


def test_adapters_and_merged_folders_read_as_the_base_does(tmp_path: Path, texts: list[str]) -> None:
    folders = []
    for name in FAMILIES:
        base = make_family_model(name, tmp_path / name, texts)
        adapter = tmp_path / f"{name}-adapter"
        companions_of_training(base, AutoTokenizer.from_pretrained(base), ModelSpec(source="hf://a/b")).write(adapter)
        request = ExportRequest(base, None, tmp_path / f"{name}-out", merged="BF16", gguf=(), name="m")
        export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
        folders += [base, adapter, tmp_path / f"{name}-out/merged"]

    found = read_folders(*folders)
    for base, adapter, merged in zip(folders[::3], folders[1::3], folders[2::3], strict=True):
        expected = {key: value for key, value in found[str(base)].items() if key != "ends"}
        for folder in (adapter, merged):
            read = found[str(folder)]
            assert {key: value for key, value in read.items() if key != "ends"} == expected
            assert read["eos"] in (read["ends"] if isinstance(read["ends"], list) else [read["ends"]])


def test_what_transformers_5_saves_is_refused(tmp_path: Path, texts: list[str]) -> None:
    base = make_family_model("llama-3.1", tmp_path / "base", texts)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="TokenizersBackend"):
        read_folders(tmp_path / "saved")
