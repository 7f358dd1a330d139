"""A driver that is too old ends the job with what was found, what is needed and what to do."""

from importlib.metadata import version
from typing import Any

import pytest
import torch

from finetune_api.failures import FailureReason
from finetune_trainer.distributed.driver import CudaNeed, check_driver, find_need
from finetune_trainer.errors import TrainerError

NEED = CudaNeed("13.0", 580)


class _Nvml:
    """NVML of a node with some driver; None: there is none."""

    class NVMLError(Exception):
        pass

    def __init__(self, driver: str | None, cuda: int = 0) -> None:
        self._driver, self._cuda = driver, cuda

    def nvmlInit(self) -> None:
        if self._driver is None:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self) -> str | None:
        return self._driver

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self._cuda


def test_the_need_is_that_of_the_installed_pytorch() -> None:
    need = find_need()
    assert need is not None
    assert need.cuda == torch.version.cuda
    assert need.driver == 580
    assert version("torch").endswith(need.cuda.replace(".", "")) or "+" not in version("torch")


def test_an_old_driver_is_named_with_what_it_runs_and_what_is_needed() -> None:
    with pytest.raises(TrainerError) as caught:
        check_driver(NEED, _Nvml("570.86.15", 12080))
    assert caught.value.reason is FailureReason.DRIVER_TOO_OLD
    message = str(caught.value)
    for part in ("driver 570.86.15", "CUDA 12.8", "CUDA 13.0", "driver 580 or newer", "spec.resources.nodeSelector"):
        assert part in message


@pytest.mark.parametrize(
    "nvml",
    [
        pytest.param(_Nvml("580.65.06", 13000), id="the oldest that is new enough"),
        pytest.param(_Nvml("570.86.15", 13000), id="an older one with NVIDIA's cuda-compat package"),
        pytest.param(_Nvml(None), id="none that answers"),
    ],
)
def test_whatever_runs_the_cuda_is_left_alone(nvml: Any) -> None:
    check_driver(NEED, nvml)
