"""The part that a LoRA adapter adds to a linear layer's output: scale * (x A^T) B^T, with x A^T computed already.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from dataclasses import dataclass

import torch

from finetune_kernels.primitives.precision import widen


@dataclass(frozen=True)
class LoraDelta:
    """scale * xa @ b^T, [T, out], kept as its two factors."""

    xa: torch.Tensor
    """x A^T [T, r]; rows may be strided."""
    b: torch.Tensor
    """B [out, r], contiguous."""
    scale: float
    """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA."""

    def widened(self) -> torch.Tensor:
        """Returns the product itself [T, out], in fp32 or fp64."""
        return self.scale * widen(self.xa) @ widen(self.b).T
