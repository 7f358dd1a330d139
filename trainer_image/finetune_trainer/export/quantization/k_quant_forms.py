"""The K-quants' parameters, which the torch and the compiled encoders share: both give the same bytes."""

from dataclasses import dataclass

import numpy as np

SUPER_BLOCK = 256


@dataclass(frozen=True)
class AffineForm:
    """x ~ d * s_j * q - e * m_j: `group` weights share a scale and a minimum; codes q are 0..top, integers s and m
    0..scale_top."""

    bits: int
    group: int
    scale_top: int
    trials: tuple[float, ...]
    """Added to `top` for the range that a group is first rounded with."""
    rounds: int
    mean_weight: bool
    """Weight of x is |x| plus the group's root mean square, not |x| alone."""

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def steps(self) -> list[float]:
        """The number of steps that each trial divides a group's range into, exact in fp32."""
        return [float(np.float32(self.top + trial)) for trial in self.trials]


@dataclass(frozen=True)
class SymmetricForm:
    """x ~ d * s_j * q: groups of 16, codes -half..half-1 (stored + half), integers s -scale_half..scale_half-1."""

    bits: int
    scale_half: int
    trials: tuple[float, ...]
    rounds: int
    scale_offset: int
    """Added to s where it is stored."""
    group: int = 16

    @property
    def half(self) -> int:
        """Half the number of codes."""
        return 1 << (self.bits - 1)

    def steps(self) -> list[float]:
        """The code that each trial gives the largest weight, exact in fp32; it takes the longer, negative side."""
        return [-float(np.float32(self.half + trial)) for trial in self.trials]


Q2_K = AffineForm(2, 16, 15, (-0.4, 0.0, 0.4, 0.8), 2, mean_weight=False)
Q4_K = AffineForm(4, 32, 63, (-2.0, -1.7, -1.4, -1.1, -0.8, -0.5, -0.2, 0.1, 0.4, 0.7, 1.0), 2, mean_weight=True)
Q5_K = AffineForm(5, 32, 63, (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0), 2, mean_weight=True)
Q3_K = SymmetricForm(3, 32, (-0.6, -0.2, 0.2, 0.6), 1, scale_offset=32)
Q6_K = SymmetricForm(6, 128, (-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9), 1, scale_offset=0)
