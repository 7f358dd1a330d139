"""Measures what a memory plan prices its choices by: one product, one decoding and one copy, in a fraction of a second.

Each is timed on the GPU's own clock behind a few products, so that launching it costs nothing, as in training, where
the CPU runs ahead. The fastest of some counts: others share the bus and the card.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit

from finetune_kernels.planning.rates import Rates
from finetune_kernels.primitives.byte_products.byte_rows import quantize_rows
from finetune_kernels.primitives.byte_products.fp8 import product
from finetune_kernels.primitives.byte_products.nf4_bytes import decode as decode_bytes
from finetune_kernels.primitives.byte_products.nf4_bytes import row_scales
from finetune_kernels.primitives.nf4 import dequantize
from finetune_trainer.distributed.world import World
from finetune_trainer.training.memory.room import Room

log = logging.getLogger(__name__)
SIZE = 4096
"""Rows and columns of the product, and of the weight that is decoded: 32 MiB in 16 bits."""
COPIED_BYTES = 1 << 25
COVER, REPEATS = 4, 3
"""Products in front of what is timed; times of each."""
DECODED = 8
"""Decodings that are timed together: one takes ten microseconds."""


def calibrated(
    room: Room, device: torch.device, world: World, dtype: torch.dtype = torch.bfloat16, *, fp8: bool = False
) -> Room:
    """Returns `room` with the rates of the slowest of all processes, so that all plan alike; with those that it has if
    one of them cannot measure. `dtype`: the run's compute type; `fp8`: frozen weights are multiplied in FP8."""
    begin = time.monotonic()
    try:
        own = astuple(measure_rates(device, dtype, fp8=fp8))
    except RuntimeError as error:  # no memory, too
        log.warning("the speeds of this machine cannot be measured: %s", error)
        own = (0.0, 0.0, 0.0)

    slowest = Rates(*(min(rates) for rates in zip(*world.gather_numbers(*own), strict=True)))
    if not all(astuple(slowest)):
        log.warning("memory plans take the speeds of an H200, as one of %d processes has no own", world.size)
        return room
    log.info("measured in %.2f s: %s", time.monotonic() - begin, slowest.words())
    return replace(room, rates=slowest.rounded())


def measure_rates(device: torch.device, dtype: torch.dtype = torch.bfloat16, *, fp8: bool = False) -> Rates:
    """Measures the rates of a GPU; leaves no memory behind. Raises RuntimeError."""
    try:
        return _measure(device, dtype, fp8=fp8)
    finally:
        torch.cuda.empty_cache()


def _measure(device: torch.device, dtype: torch.dtype, *, fp8: bool) -> Rates:
    # Numbers of a generator of their own: the run's is left as it is.
    draw = torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(SIZE, SIZE, dtype=dtype, device=device, generator=draw) for _ in (0, 1))
    out = torch.empty_like(x)
    packed, state = quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    host = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(host, device=device)

    def multiply() -> None:
        torch.mm(x, w, out=out)

    def decode() -> None:
        for _ in range(DECODED):
            dequantize(packed, state, out)

    def copy() -> None:
        target.copy_(host, non_blocking=True)

    work = _fp8_work(x, packed, state) if fp8 else (multiply, decode)
    return Rates(
        products=2.0 * SIZE**3 / _seconds(work[0], multiply),
        decoding=1.0 * DECODED * SIZE**2 / _seconds(work[1], multiply),
        copying=COPIED_BYTES / _seconds(copy, multiply),
    )


def _fp8_work(x: torch.Tensor, packed: torch.Tensor, state: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns a product in FP8, x quantised before it, and as many decodings to FP8, half of them as columns."""
    scales = row_scales(state, torch.float8_e4m3fn)
    rows, columns = (torch.zeros(SIZE, SIZE, dtype=torch.float8_e4m3fn, device=x.device) for _ in (0, 1))
    inverses = 1 / scales

    def multiply() -> None:
        product(*quantize_rows(x), rows, scales, None, x.dtype)

    def decode() -> None:
        for _ in range(DECODED // 2):
            decode_bytes(packed, state, inverses, rows, transposed=False)
            decode_bytes(packed, state, inverses, columns, transposed=True)

    return multiply, decode


def _seconds(work: Callable[[], None], cover: Callable[[], None]) -> float:
    """Seconds of `work` on the GPU, which does `cover` before, for as long as the CPU needs to launch `work`."""
    work()  # loads and compiles kernels
    found: list[float] = []
    for _ in range(REPEATS):
        begin, end = _event(), _event()
        for _ in range(COVER):
            cover()
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return min(found)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
