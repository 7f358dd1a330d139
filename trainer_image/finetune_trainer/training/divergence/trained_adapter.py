"""Checks the adapter that is to be exported: it holds numbers only, and training has changed it.

B begins at zero, so that an adapter changes nothing before its first step. If every B is still zero at the end, no
step has trained it, and the result is the base model. That holds for DoRA, too: a step that trains magnitudes trains B.
"""

import logging
from typing import Any

import torch

from finetune_api.failures import FailureReason
from finetune_kernels.primitives.master_weights import master_weight
from finetune_trainer.errors import TrainerError

log = logging.getLogger(__name__)
B_MATRIX = ".lora_B."
MAX_NAMED = 3


def check_trained_adapter(model: Any, steps: int) -> None:
    """Checks a peft model after `steps` optimiser steps. Raises TrainerError (NonFiniteLoss, NothingLearned)."""
    parameters = [(name, weights) for name, weights in model.named_parameters() if weights.requires_grad]
    trained = {name: master_weight(weights).detach() for name, weights in parameters}  # what is exported
    if broken := [name for name, weights in trained.items() if not torch.isfinite(weights).all()]:
        message = f"the adapter holds NaN or infinity after {steps} steps, in {_named(broken)}"
        raise TrainerError(FailureReason.NON_FINITE_LOSS, message)

    matrices = [name for name in trained if B_MATRIX in name]
    untouched = [name for name in matrices if not trained[name].any()]
    if matrices and len(untouched) == len(matrices):
        message = f"every B matrix of the adapter is zero after {steps} steps: the result would equal the base model"
        raise TrainerError(FailureReason.NOTHING_LEARNED, message)
    if untouched:
        log.warning("training left %d of %d layers unchanged: %s", len(untouched), len(matrices), _named(untouched))


def _named(names: list[str]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
