"""Energy of the run's GPUs, from the counters that NVIDIA's driver keeps (NVML). Without PyTorch.

A counter is of a whole card, in millijoules since the driver was loaded (Volta and newer). Where a card is shared by
MIG, or nothing counts, there is no figure: an absent one is honest, a zero is not.
"""

import logging
import os
from typing import Any

log = logging.getLogger(__name__)
MILLIJOULES = 1000
"""In a joule."""


class EnergyMeter:
    """The energy that some GPUs have taken since this object was made."""

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        """`handles`: NVML's, one for each GPU. Raises NVMLError if a counter cannot be read."""
        self._nvml = nvml
        self._last = [(handle, self._read(handle)) for handle in handles]  # millijoules
        self._taken = 0  # millijoules
        self.count = len(handles)

    def joules(self) -> int:
        """Returns the energy so far, of all GPUs. What was measured stays if a counter can no longer be read."""
        for place, (handle, last) in enumerate(self._last):
            try:
                now = self._read(handle)
            except self._nvml.NVMLError as error:
                log.debug("energy: %s", error)
                continue
            # A counter that is lower began again, as the driver was loaded anew.
            self._taken += now - last if now >= last else now
            self._last[place] = (handle, now)
        return self._taken // MILLIJOULES

    def _read(self, handle: Any) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def open_meter(gpus: int, visible: str | None = None, nvml: Any = None) -> EnergyMeter | None:
    """Begins to measure the run's GPUs; None, with the cause in the log, where nothing measures them.

    `visible`: CUDA_VISIBLE_DEVICES; None is that of this process. `nvml`: the module pynvml.
    """
    if gpus == 0:
        return None

    try:
        meter, cause = _open(gpus, os.environ.get("CUDA_VISIBLE_DEVICES", "") if visible is None else visible, nvml)
    except ModuleNotFoundError:
        meter, cause = None, "package nvidia-ml-py is not installed"
    log.info("energy is measured on %d GPUs", meter.count) if meter else log.info("energy is not measured: %s", cause)
    return meter


def _open(gpus: int, visible: str, nvml: Any) -> tuple[EnergyMeter | None, str]:
    """Returns the meter, or why there is none. Raises ModuleNotFoundError."""
    if nvml is None:
        import pynvml

        nvml = pynvml

    try:
        nvml.nvmlInit()
        handles = _handles(nvml, visible)[:gpus]
        if len(handles) < gpus:
            return None, f"the driver shows {len(handles)} of {gpus} GPUs"
        if any(_is_partitioned(nvml, handle) for handle in handles):
            return None, "the GPU is divided by MIG, and its counter is of the whole card"
        return EnergyMeter(nvml, handles), ""
    except nvml.NVMLError as error:
        return None, f"NVML says {error}"


def _handles(nvml: Any, visible: str) -> list[Any]:
    """The cards that CUDA sees, in its order; without CUDA_VISIBLE_DEVICES all that this container sees."""
    named = [name.strip() for name in visible.split(",") if name.strip()]
    if not named:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)
        for name in named
    ]


def _is_partitioned(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:
        return False  # a card that knows no MIG
