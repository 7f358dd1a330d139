"""A driver that is too old ends the job with what was found, what is needed and what to do."""

from importlib.metadata import version
from typing import Any

import pytest
import torch

from finetune_api.failures import FailureReason
from finetune_trainer.distributed.driver import CudaNeed, check_capability, check_driver, find_need
from finetune_trainer.errors import TrainerError

NEED = CudaNeed("13.0", 580)


class _Nvml:
    """NVML of a node with some driver; None: there is none."""

    class NVMLError(Exception):
        pass

    def __init__(self, driver: str | None, cuda: int = 0) -> None:
        self._driver, self._cuda = driver, cuda

    cards: tuple[tuple[str, tuple[int, int]], ...] = ()
    """Names and compute capabilities."""

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.cards[handle][0]

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return self.cards[handle][1]

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


V100, T4 = ("Tesla V100-SXM2-16GB", (7, 0)), ("Tesla T4", (7, 5))


def test_a_pod_with_a_card_that_is_too_old_ends_with_its_name_and_what_to_choose() -> None:
    nvml = _Nvml("580.65.06", 13000)
    nvml.cards = (V100, V100)
    with pytest.raises(TrainerError) as caught:
        check_capability(nvml)
    assert caught.value.reason is FailureReason.INVALID_CONFIGURATION
    for part in ("Tesla V100-SXM2-16GB (compute capability 7.0)", "CUDA 13", "T4 or RTX 20", "spec.pod.gpuProducts"):
        assert part in str(caught.value)


@pytest.mark.parametrize("cards", [(T4,), (V100, T4), (("NVIDIA H200", (9, 0)),), ()], ids=str)
def test_other_cards_are_taken(cards: tuple[tuple[str, tuple[int, int]], ...]) -> None:
    """PyTorch takes the newest card of a machine that has several."""
    nvml = _Nvml("580.65.06", 13000)
    nvml.cards = cards
    check_capability(nvml)
    check_capability(_Nvml(None))
