"""Energy of GPUs: what NVML's counters say, summed over the pod's cards; absent, never zero, where nothing counts."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_trainer.job.energy import open_meter
from finetune_trainer.job.outcome import failed
from finetune_trainer.job.progress_tracker import ProgressTracker


class NVMLError(Exception):
    """The error of pynvml."""


class PlayedDriver:
    """Cards with counters in millijoules; test_gpu_energy.py has the real driver."""

    NVMLError = NVMLError

    def __init__(self, *counters: int, mig: bool = False, is_absent: bool = False) -> None:
        self.counters, self.mig, self.is_absent = list(counters), mig, is_absent

    def nvmlInit(self) -> None:
        if self.is_absent:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.counters)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:
        return (int(self.mig), int(self.mig))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if self.counters[handle] < 0:
            raise NVMLError("Not Supported")
        return self.counters[handle]


def test_energy_is_that_of_the_runs_cards_since_the_start() -> None:
    driver = PlayedDriver(5_000_000, 7_000_000, 9_000_000)
    meter = open_meter(2, visible="", nvml=driver)
    assert meter is not None
    assert meter.joules() == 0
    driver.counters = [5_300_000, 7_200_000, 10_000_000]
    assert meter.joules() == 500, "the third card is somebody else's"


@pytest.mark.parametrize("visible", ["2", "GPU-2"])
def test_only_the_cards_that_cuda_sees_count(visible: str) -> None:
    driver = PlayedDriver(0, 0, 0)
    meter = open_meter(1, visible=visible, nvml=driver)
    driver.counters = [1_000_000, 1_000_000, 3_000_000]
    assert meter is not None
    assert meter.joules() == 3000


def test_a_counter_that_begins_again_or_fails_takes_nothing_away() -> None:
    driver = PlayedDriver(1_000_000)
    meter = open_meter(1, visible="", nvml=driver)
    assert meter is not None
    for counter, expected in ((1_400_000, 400), (100_000, 500), (-1, 500), (300_000, 700)):
        driver.counters = [counter]
        assert meter.joules() == expected


ABSENT = {
    "a CPU": (0, PlayedDriver(), ""),
    "no driver": (1, PlayedDriver(is_absent=True), "NVML says Driver Not Loaded"),
    "no counter": (1, PlayedDriver(-1), "NVML says Not Supported"),
    "a part of a card": (1, PlayedDriver(5, mig=True), "divided by MIG"),
    "fewer cards than the job has": (2, PlayedDriver(5), "the driver shows 1 of 2 GPUs"),
}


@pytest.mark.parametrize(("gpus", "driver", "cause"), ABSENT.values(), ids=ABSENT)
def test_what_nothing_measures_is_absent_and_the_log_says_why(
    gpus: int, driver: PlayedDriver, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert open_meter(gpus, visible="", nvml=driver) is None
    assert cause in caplog.text
    progress = ProgressTracker()
    progress.measure_energy(None)
    assert progress.report().finetune.energy_joules is None


def test_an_installation_without_the_package_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_meter(1, visible="") is None
    assert "package nvidia-ml-py is not installed" in caplog.text


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has NVIDIA's driver")
def test_the_real_library_without_a_driver_measures_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert open_meter(1, visible="") is None
    assert "energy is not measured: NVML says" in caplog.text


def test_reports_and_last_words_carry_the_newest_energy() -> None:
    meter: Any = SimpleNamespace(joules=iter((10, 20)).__next__)
    progress = ProgressTracker()
    progress.measure_energy(meter)
    assert progress.report().finetune.energy_joules == 10
    assert failed(RuntimeError("x"), progress).energy_joules == 20
