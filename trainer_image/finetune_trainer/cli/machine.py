"""The user's machine, as far as it can be known without PyTorch."""

from pathlib import Path


def has_nvidia_gpu(devices: Path = Path("/dev")) -> bool:
    """True if the NVIDIA driver shows a GPU; under WSL it has one device file for all of them."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()
