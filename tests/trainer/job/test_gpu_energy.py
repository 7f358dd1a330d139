"""Energy on a real GPU: the driver's counter rises by what a busy card takes, and by less while it is idle."""

import time

import pytest
import torch

from finetune_trainer.job.energy import EnergyMeter, open_meter

pytestmark = pytest.mark.gpu
SECONDS = 3.0


def watts(meter: EnergyMeter, *, is_busy: bool) -> float:
    """Mean power of the card over some seconds, with or without matrix products."""
    size = 8192
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    began, before = time.monotonic(), meter.joules()
    while time.monotonic() - began < SECONDS:
        if is_busy:
            left @ left
            torch.cuda.synchronize()
        else:
            time.sleep(0.1)
    return (meter.joules() - before) / (time.monotonic() - began)


def test_a_busy_gpu_takes_more_than_an_idle_one_and_no_more_than_its_board() -> None:
    meter = open_meter(1)
    assert meter is not None, "the log says why nothing is measured"
    idle, busy = watts(meter, is_busy=False), watts(meter, is_busy=True)
    print(f"{torch.cuda.get_device_name()}: {idle:.0f} W idle, {busy:.0f} W busy")
    assert 5 < idle < busy < 1500
    assert busy > 1.5 * idle
