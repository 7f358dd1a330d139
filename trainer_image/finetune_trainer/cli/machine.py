"""The user's machine, as far as it can be known without PyTorch."""

import os
from collections.abc import MutableMapping
from pathlib import Path


def has_nvidia_gpu(devices: Path = Path("/dev")) -> bool:
    """True if the NVIDIA driver shows a GPU; under WSL it has one device file for all of them."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()


def describe_device(gpus: int, has_gpu: bool) -> str | None:
    """Says where a job of `gpus` GPUs would run on this machine, and so what its checks leave out; None: on its GPU."""
    if gpus == 0:
        return "the job trains on the CPU: its time and its memory are not estimated"
    if has_gpu:
        return None
    return (
        "this machine has no NVIDIA GPU, so `finetune run` would stop here (gpus: 0 or --gpus 0 trains on the CPU, "
        "tiny models only); whether the job fits a GPU is checked only against spec.resources.gpuMemory or nodeSelector"
    )


def let_gpu_memory_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Gives PyTorch the settings for GPU memory that pods have, unless a person has written some, in the older variable
    or the newer one. PyTorch reads them at its first use of a GPU."""
    from finetune_api.gpus import GPU_ALLOCATOR  # pydantic takes longer than `finetune --help`

    if not any(name in environment for name in (*GPU_ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF")):
        environment.update(GPU_ALLOCATOR)
