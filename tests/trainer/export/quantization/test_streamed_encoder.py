"""Large weights on a CPU are encoded piece by piece on the threads that write them, from memory that is used again:
with small pieces, the files are those of whole tensors encoded in torch, and what goes wrong on a thread is heard."""

from pathlib import Path

import pytest
import torch

from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer.export.errors import OverflowingWeightsError
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.export.quantization import quantize as quantize_module
from finetune_trainer.export.quantization.cpu import encode
from finetune_trainer.export.tensor_io import buffers
from finetune_trainer.export.tensor_io.safetensors_files import list_tensors

TYPES = ("F32", "F16", "BF16", "Q8_0")


def run(base: Path, output: Path, merged: str, types: tuple[str, ...] = TYPES) -> dict[str, bytes]:
    """Contents of all files, by name."""
    request = ExportRequest(base=base, adapter=None, output=output, merged=merged, gguf=types, name="m")
    files = export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    return {file.path.name: file.path.read_bytes() for file in files}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled encoders for any number of weights, 4,096 at a time, which divides no tensor of the tiny model's MLP."""
    for name in ("MIN_COMPILED_WEIGHTS", "MIN_COMPILED_FLOATS"):
        monkeypatch.setattr(quantize_module, name, 1)
    monkeypatch.setattr(encode, "TASK_WEIGHTS", 4096)
    monkeypatch.setattr(buffers, "MIN_POOLED_BYTES", 1)


@pytest.mark.parametrize(
    ("dtype", "merged"), [(torch.bfloat16, "FP16"), (torch.float16, "BF16"), (torch.float32, "BF16")]
)
def test_files_are_those_of_whole_tensors(
    dtype: torch.dtype, merged: str, tmp_path: Path, texts: list[str], request: pytest.FixtureRequest
) -> None:
    base = make_tiny_model(tmp_path / "base", texts=texts, dtype=dtype, vocab_size=517, intermediate_size=768)
    whole = run(base, tmp_path / "whole", merged)
    request.getfixturevalue("small_pieces")
    assert run(base, tmp_path / "pieces", merged) == whole


def test_weights_that_float16_cannot_hold_are_named_from_a_thread(
    tmp_path: Path, texts: list[str], small_pieces: None
) -> None:
    base = make_tiny_model(tmp_path / "base", texts=texts, dtype=torch.bfloat16)
    path = base / "model.safetensors"
    matrix = next(tensor for tensor in list_tensors(path) if "down_proj" in tensor.name)
    data = bytearray(path.read_bytes())
    last = matrix.offset + matrix.size
    data[last - 2 : last] = torch.tensor([1e30]).bfloat16().view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    with pytest.raises(OverflowingWeightsError, match=r"float16 cannot hold; merge as BF16"):
        run(base, tmp_path / "out", "FP16", ())
    with pytest.raises(OverflowingWeightsError, match=r"float16 cannot hold; choose BF16 or a quantised type"):
        run(base, tmp_path / "out", "BF16", ("F16",))
    assert [path.name for path in (tmp_path / "out").iterdir()] == []
