"""NVIDIA's driver of the node, against what the CUDA of this installation needs. Knows no PyTorch.

The CUDA is that of PyTorch's wheels, which depend on its run time; so its package's version is it. A driver runs every
CUDA of its own major version and older ones (NVIDIA, "CUDA Compatibility").
"""

import logging
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.gpus import DRIVER_LABEL, OLDEST_CAPABILITY, PRODUCT_LABEL
from finetune_trainer.errors import TrainerError

log = logging.getLogger(__name__)

OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""Oldest driver for each major version of CUDA."""

_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")
"""Packages of CUDA's run time; until CUDA 12 the version was in the name."""


@dataclass(frozen=True)
class CudaNeed:
    """CUDA of this installation, and the oldest driver that runs it."""

    cuda: str
    """Such as 13.0."""
    driver: int
    """Major version, such as 580."""

    @property
    def cuda_major(self) -> int:
        return int(self.cuda.split(".")[0])


def find_need() -> CudaNeed | None:
    """Returns what this installation needs; None if it has no CUDA that the table knows."""
    for package in _RUNTIMES:
        try:
            cuda = ".".join(version(package).split(".")[:2])
        except PackageNotFoundError:
            continue
        oldest = OLDEST_DRIVERS.get(int(cuda.split(".")[0]))
        return CudaNeed(cuda, oldest) if oldest else None
    return None


def check_driver(need: CudaNeed | None = None, nvml: Any = None) -> None:
    """Raises TrainerError (DriverTooOld) if this node's driver cannot run the CUDA of this installation.

    Where NVML says nothing, nothing is known, and PyTorch will say what it misses. `nvml`: the module pynvml.
    """
    need = need or find_need()
    if need is None:
        return
    if nvml is None:
        import pynvml

        nvml = pynvml

    # A package "cuda-compat" may bring a newer libcuda than the driver's own; NVML reports the CUDA of that one.
    try:
        nvml.nvmlInit()
        driver, cuda = str(nvml.nvmlSystemGetDriverVersion()), int(nvml.nvmlSystemGetCudaDriverVersion_v2())
    except nvml.NVMLError as error:
        log.info("the driver is not checked: NVML says %s", error)
        return

    if cuda // 1000 < need.cuda_major:
        runs = f"{cuda // 1000}.{cuda % 1000 // 10}"
        found = f"this node has NVIDIA's driver {driver}, which runs CUDA {runs} and older"
        raise TrainerError(FailureReason.DRIVER_TOO_OLD, f"{found}, but {describe_need(need)}")


def check_capability(nvml: Any = None) -> None:
    """Raises TrainerError (InvalidConfiguration) if this pod sees GPUs, and all are older than the trainer's CUDA
    knows. `nvml`: the module pynvml."""
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        nvml.nvmlInit()
        cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        found = [(nvml.nvmlDeviceGetCudaComputeCapability(card), str(nvml.nvmlDeviceGetName(card))) for card in cards]
    except nvml.NVMLError as error:
        log.info("the GPUs' age is not checked: NVML says %s", error)
        return

    if not found:
        return
    (major, minor), name = max((tuple(capability), name) for capability, name in found)
    if major + minor / 10 < OLDEST_CAPABILITY:
        message = describe_old_card(f"{name} (compute capability {major}.{minor})")
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, f"spec.resources: {message}")


def describe_old_card(card: str) -> str:
    """Tells why a card from before Turing is refused, and what to choose."""
    return (
        f"{card} is older than Turing, the oldest generation that CUDA 13 and the trainer's PyTorch have kernels for "
        f"(compute capability {OLDEST_CAPABILITY}): choose a T4 or RTX 20 (FP16), or an Ampere card or a later one "
        f"(BF16), by {PRODUCT_LABEL} in spec.resources.nodeSelector or by spec.pod.gpuProducts"
    )


def describe_need(need: CudaNeed) -> str:
    """The need in words, and what to do."""
    return (
        f"the trainer is built for CUDA {need.cuda}, which needs driver {need.driver} or newer: update the driver of "
        f"the GPU nodes, or choose nodes that have it in spec.resources.nodeSelector ({DRIVER_LABEL})"
    )
