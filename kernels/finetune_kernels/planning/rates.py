"""Speeds of a machine, by which a memory plan prices its choices. Pure: `finetune_trainer.training.memory.calibration`
measures them, and where nothing is measured (preflight) they are an H200's.

Only their ratios decide what a plan keeps.
"""

import math
from dataclasses import astuple, dataclass

UNLIMITED = 1 << 60
"""Bytes of a memory of which nothing is known."""
STEPS = 4
"""Steps within a factor of two to which measured rates are rounded."""


@dataclass(frozen=True)
class Rates:
    """Rates of the work that a plan saves or spends."""

    products: float
    """FLOP/s of matrix products with frozen weights."""
    decoding: float
    """Weights decoded from NF4 per second, to 16 bits or to FP8."""
    copying: float
    """Bytes per second between pinned host memory and the GPU."""

    def rounded(self) -> "Rates":
        """Returns the rates in steps of a fifth, so that a machine gets the same plan at every start."""
        return Rates(*(2 ** (round(STEPS * math.log2(rate)) / STEPS) for rate in astuple(self)))

    def words(self) -> str:
        """The rates for people."""
        return (
            f"{self.products / 1e12:,.0f} TFLOP/s in products, {self.decoding / 1e9:,.0f} billion weights/s decoded, "
            f"{self.copying / 1e9:,.0f} GB/s from pinned memory"
        )


H200_FP8 = Rates(products=1.3e15, decoding=1.37e12, copying=5.5e10)
"""Of a job in FP8, measured: products with frozen weights 1,340 to 1,530 TFLOP/s, and the quantising of inputs;
decoding to E4M3 1.21 trillion weights/s as rows, 1.57 as columns."""
H200 = Rates(products=7.0e14, decoding=1.4e12, copying=5.5e10)
"""Measured on an H200: products of these shapes 685 to 783 TFLOP/s; decoding to bfloat16."""


@dataclass(frozen=True)
class Machine:
    """A machine beside the memory of its GPU, as a plan for one process sees it."""

    host_room: int = UNLIMITED
    """Bytes of host memory that this process may pin."""
    rates: Rates = H200
    streamed_layers: int = 0
    """Layers whose weights are in host memory already, as the model was loaded there."""


UNKNOWN_MACHINE = Machine()
"""A machine of which nothing is known."""
