"""Our 8-bit AdamW, which stands in for bitsandbytes' where a configuration names that one."""

from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig

from finetune_kernels.primitives.multi_tensor_adamw import MultiTensorAdamW8bit

ADAMW_8BIT = "adamw_8bit"
"""transformers' name of the 8-bit AdamW of bitsandbytes."""


def choose_optimizer(arguments: SFTConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Returns our optimiser and its options if `arguments` name the 8-bit AdamW; None leaves the choice to TRL."""
    if arguments.optim != ADAMW_8BIT:
        return None

    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return MultiTensorAdamW8bit, {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}
