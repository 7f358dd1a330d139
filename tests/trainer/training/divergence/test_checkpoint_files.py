"""Numbers that are none are found in every file of a checkpoint that training goes on from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune_trainer.training.divergence.checkpoint_files import find_non_finite

FILES = {
    "adapter_model.safetensors": "NaN or infinity in adapter_model.safetensors (b)",
    "best/adapter.safetensors": "NaN or infinity in best/adapter.safetensors (b)",
    "optimizer.pt": "NaN or infinity in optimizer.pt (absmax1)",
}


def write(folder: Path, name: str, tensor: torch.Tensor) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".pt":
        state = {"step": 3, "state1": torch.full((4,), 255, dtype=torch.uint8), "absmax1": tensor}
        torch.save({"vectors": {"state": {0: state}}, "param_groups": [{"lr": 0.1}]}, path)
    else:
        save_file({"a": torch.ones(3), "b": tensor}, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("broken", "message"), FILES.items(), ids=FILES)
def test_the_file_and_the_tensor_are_named(
    tmp_path: Path, broken: str, message: str, value: float, dtype: torch.dtype
) -> None:
    for name in FILES:
        write(tmp_path, name, torch.ones(5, dtype=dtype))
    assert find_non_finite(tmp_path) is None
    write(tmp_path, broken, torch.tensor([1.0, value], dtype=dtype))
    assert find_non_finite(tmp_path) == message
