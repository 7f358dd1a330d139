"""What is known of the user's machine, and PyTorch's settings there."""

from pathlib import Path

import pytest

from finetune_trainer.cli.machine import describe_device, has_nvidia_gpu, let_gpu_memory_grow


def test_a_machine_without_a_gpu_is_said(tmp_path: Path) -> None:
    assert not has_nvidia_gpu(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert has_nvidia_gpu(tmp_path)

    assert describe_device(1, has_gpu=True) is None
    assert "trains on the CPU" in (describe_device(0, has_gpu=True) or "")
    said = describe_device(1, has_gpu=False) or ""
    assert "no NVIDIA GPU" in said
    assert "--gpus 0" in said
    assert "is checked only against" in said


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_run_has_the_gpu_memory_settings_of_a_pod_unless_a_person_wrote_some(name: str) -> None:
    environment = {"HOME": "/home/me"}
    let_gpu_memory_grow(environment)
    assert environment == {"HOME": "/home/me", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}

    written = {name: "max_split_size_mb:512"}
    let_gpu_memory_grow(environment := dict(written))
    assert environment == written
