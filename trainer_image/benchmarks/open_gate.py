"""FP8 whatever its gate would say: what it refuses is measured, too, and random weights, of which deep gradients are
noise, are refused (a cosine of 0.66 over 32 layers, beside a loss that differs by 0.04 %)."""

import math

from finetune_trainer.training import fp8_gate


def open_fp8_gate() -> None:
    """Lets every change pass, for the whole process."""
    fp8_gate.LIMITS = fp8_gate.Limits(loss=math.inf, cosine=-1, norm=math.inf)
