"""The speeds that memory plans are priced by, measured on a GPU: in a third of a second, and as a long measurement."""

import time
from dataclasses import astuple

import pytest
import torch

from finetune_trainer.distributed.world import ALONE
from finetune_trainer.training.memory.calibration import calibrated, measure_rates
from finetune_trainer.training.memory.room import Room

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # a GPU's image has other versions than the lock, which warn of other things
]
CUDA = torch.device("cuda")
LONG_SECONDS = 1.0


def test_it_takes_no_time_and_leaves_nothing() -> None:
    first = measure_rates(CUDA)  # compiles a kernel and starts cuBLAS, which training needs as well
    torch.cuda.synchronize()
    used, random, begin = torch.cuda.memory_allocated(), torch.cuda.get_rng_state(), time.monotonic()
    room = calibrated(Room(0, 1, 2), CUDA, ALONE)
    seconds = time.monotonic() - begin
    print(f"{seconds:.3f} s: {first.words()}; planned by {room.rates.words()}")
    assert seconds < 0.3
    assert torch.cuda.memory_allocated() == used
    assert torch.equal(torch.cuda.get_rng_state(), random)

    second = measure_rates(CUDA)
    for one, other in zip(astuple(first), astuple(second), strict=True):
        assert 0.8 < one / other < 1.25, "two measurements agree"


def test_products_and_copies_are_those_of_a_long_measurement() -> None:
    found = measure_rates(CUDA)
    x, w = (torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda") for _ in (0, 1))
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device="cuda")

    def rate(work: float, call: object) -> float:
        assert callable(call)
        torch.cuda.synchronize()
        begin, count = time.monotonic(), 0
        while time.monotonic() - begin < LONG_SECONDS:
            for _ in range(10):
                call()
            torch.cuda.synchronize()
            count += 10
        return work * count / (time.monotonic() - begin)

    products = rate(2.0 * 4096**3, lambda: x @ w)
    copies = rate(float(host.numel()), lambda: target.copy_(host, non_blocking=True))
    print(f"products {found.products:.3g} beside {products:.3g}, copies {found.copying:.3g} beside {copies:.3g}")
    assert 0.7 < found.products / products < 1.5, "a long one is slowed by the card's power limit"
    assert 0.7 < found.copying / copies < 1.4
