"""Merged weights in fp32: the values that every exported file is rounded from."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune_trainer.export.adapter import open_adapter
from finetune_trainer.export.base_model.folder import open_base_model


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder, by name."""
    return {tensor.name: tensor.read() for tensor in open_base_model(folder).tensors}


def merged_in_fp32(base: Path, adapter: Path, folder: Path) -> Path:
    """Writes a folder with the merged weights before they are rounded, and returns it."""
    opened, files = open_adapter(adapter, open_base_model(base)), load_all(base)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    merged = {name: opened.merge(name, value).float().contiguous() for name, value in files.items()}
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
