"""The job's optimiser over fp32 master weights, and our schedule of the learning rate in place of transformers'.

transformers' warm-up begins at 0, so the first step learns nothing, and a run of one step nothing at all. It also takes
any length, so a run can end before it has reached its peak. Here the rate of step s (from 0) of S, with a warm-up of W
steps, is the peak times

    (s + 1) / (W + 1)                    s < W
    1                                    Constant
    1 - (s - W) / (S - W)                Linear
    (1 + cos(pi (s - W) / (S - W))) / 2  Cosine

The rate depends on s, S and W alone, so a run that resumes goes on with the rates of a run that never stopped.
"""

import logging
import math
from functools import partial
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
from torch.optim.lr_scheduler import LambdaLR
from transformers.training_args import OptimizerNames
from trl.trainer.sft_config import SFTConfig

from finetune_api.spec.training import resolve_warmup
from finetune_kernels.primitives.multi_tensor_adamw import MultiTensorAdamW

log = logging.getLogger(__name__)
INNER: dict[OptimizerNames, Any] = {
    OptimizerNames.ADAMW_8BIT: AdamW8bit,
    OptimizerNames.PAGED_ADAMW_8BIT: PagedAdamW8bit,
    OptimizerNames.ADAMW_TORCH: torch.optim.AdamW,
}
"""What updates the master weights, by the name that a configuration gives it."""


def choose_optimizer(arguments: SFTConfig) -> tuple[type[MultiTensorAdamW], dict[str, Any]]:
    """Returns our optimiser and its options."""
    return MultiTensorAdamW, {
        "inner": INNER[OptimizerNames(arguments.optim)],
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
    }


def create_schedule(arguments: Any, optimizer: Any, steps: int) -> LambdaLR:
    """Returns the schedule of a run of `steps`; `arguments`, an SFTConfig, name its kind and the warm-up that the job
    asks for."""
    written = arguments.lr_scheduler_kwargs["warmup_steps"]
    warmup = resolve_warmup(written, steps)
    if written is not None and warmup != written:
        log.warning("warmupSteps: %d is not below the run's %d steps: the warm-up is %d steps", written, steps, warmup)

    return LambdaLR(optimizer, partial(rate_factor, str(arguments.lr_scheduler_type.value), steps=steps, warmup=warmup))


def rate_factor(kind: str, step: int, *, steps: int, warmup: int) -> float:
    """Returns the learning rate of a step (from 0) over the peak: above 0 for every step of the run.

    `kind`: "linear", "cosine" or "constant", as transformers names them.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)

    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2.0}[kind]
