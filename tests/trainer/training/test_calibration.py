"""The speeds that memory plans are priced by, measured at the start: here the clock is played, on a GPU it is the
GPU's (test_gpu_calibration.py)."""

import logging
from collections.abc import Callable
from dataclasses import astuple, dataclass

import pytest
import torch

from finetune_kernels.planning.rates import H200, STEPS, Rates
from finetune_trainer.distributed.world import ALONE
from finetune_trainer.training.memory import calibration
from finetune_trainer.training.memory.calibration import calibrated, measure_rates
from finetune_trainer.training.memory.room import Room

CPU = torch.device("cpu")
ROOM = Room(base=1, total=2, host=3)
SECONDS = {"multiply": 1e-3, "decode": 2e-6, "copy": 5e-4}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of each work, which is done once, too; small enough for the interpreter."""
    seconds = dict(SECONDS)

    def play(work: Callable[[], None], cover: Callable[[], None]) -> float:
        cover()
        work()
        return seconds[work.__name__]

    monkeypatch.setattr(calibration, "_seconds", play)
    monkeypatch.setattr(calibration, "SIZE", 128)
    return seconds


@dataclass
class Two:
    """Two processes; the other's rates are given."""

    other: tuple[float, float, float]
    size: int = 2

    def gather_numbers(self, *numbers: float) -> list[list[float]]:
        return [list(numbers), list(self.other)]


def test_rates_are_work_over_time(clock: dict[str, float]) -> None:
    found = measure_rates(CPU)
    assert found.products == 2 * 128**3 / 1e-3
    assert found.decoding == pytest.approx(calibration.DECODED * 128**2 / 2e-6)
    assert found.copying == 2**25 / 5e-4
    clock["decode"] *= 2
    assert measure_rates(CPU).decoding == found.decoding / 2


def test_a_job_in_fp8_is_priced_by_products_and_decodings_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU PyTorch's product, and the kernel in the interpreter."""
    calls: list[str] = []
    for name in ("product", "decode_bytes", "dequantize"):
        real = getattr(calibration, name)

        def called(
            *arguments: object, name: str = name, real: Callable[..., object] = real, **options: object
        ) -> object:
            calls.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(calibration, name, called)

    assert measure_rates(CPU, fp8=True) == measure_rates(CPU), "the same work, by a clock that is played"
    half, whole = calibration.DECODED // 2, calibration.DECODED
    assert calls == ["product", *["decode_bytes"] * 2 * half, *["dequantize"] * whole]
    calls.clear()
    calibrated(ROOM, CPU, ALONE, fp8=True)
    assert "product" in calls


def test_the_random_numbers_of_the_run_are_left_as_they_are() -> None:
    before = torch.get_rng_state()
    measure_rates(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_slowest_process_counts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    own = measure_rates(CPU)
    assert calibrated(ROOM, CPU, ALONE).rates == own.rounded()
    other = (own.products * 10, own.decoding / 10, own.copying)
    room = calibrated(ROOM, CPU, Two(other))  # type: ignore[arg-type]
    assert room.rates == Rates(own.products, own.decoding / 10, own.copying).rounded()
    assert (room.base, room.total, room.host) == (1, 2, 3)
    assert f"billion weights/s decoded, {own.copying / 1e9:,.0f} GB/s from pinned memory" in caplog.text


def test_who_cannot_measure_says_so_and_all_plan_by_an_h200(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calibrated(ROOM, CPU, Two((0.0, 0.0, 0.0))) == ROOM  # type: ignore[arg-type]
    assert "plans take the speeds of an H200, as one of 2 processes has no own" in caplog.text
    assert ROOM.rates == H200

    def fail(work: Callable[[], None], cover: Callable[[], None]) -> float:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(calibration, "_seconds", fail)
    assert calibrated(ROOM, CPU, ALONE) == ROOM
    assert "the speeds of this machine cannot be measured: no memory" in caplog.text


def test_a_machine_gets_the_same_rates_at_every_start() -> None:
    """Rounded to steps of a fifth: never further off than half a step, and the same for measurements close to it."""
    for factor in (0.13, 1.0, 1.1, 7.7):
        rates = Rates(*(factor * rate for rate in astuple(H200)))
        rounded = rates.rounded()
        for found, measured in zip(astuple(rounded), astuple(rates), strict=True):
            assert 2 ** (-0.5 / STEPS) <= found / measured <= 2 ** (0.5 / STEPS)
        assert rounded.rounded() == rounded
        assert Rates(*(1.07 * rate for rate in astuple(rounded))).rounded() == rounded
        assert Rates(*(1.2 * rate for rate in astuple(rounded))).rounded() != rounded
