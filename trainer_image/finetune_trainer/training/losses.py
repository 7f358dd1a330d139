"""Next-token loss on supervised tokens only: the language model head never sees a position without a label.

This is the loss in plain PyTorch; on a GPU the kernels' fused head and loss takes its place (see engine.py).
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional


def supervised_loss(
    model: Any,
    inputs: Mapping[str, Any],
    labels: torch.Tensor,
    positions: torch.Tensor,
    num_items: torch.Tensor | int | None,
) -> torch.Tensor:
    """Cross entropy in fp32, summed over the supervised tokens and divided by `num_items` (None: by their number).

    `labels` [B, T] and `positions` [S] as the collators make them: of the flattened batch, the token at p predicts
    label p + 1.
    """
    # With a cache, transformers does not look for documents in position_ids: packed documents would see each other.
    inputs = {**inputs, "use_cache": False}
    if not takes_positions(model):
        found = model(**inputs)
        logits = found.logits.flatten(0, 1)[positions]  # [S, vocabulary], out of [B T, vocabulary]
    elif len(labels) == 1:
        found = model(**inputs, logits_to_keep=positions)
        logits = found.logits[0]  # [S, vocabulary]
    else:
        # Models keep the same columns of all rows: those that are supervised in any of them.
        length = labels.shape[1]
        columns, kept = torch.unique(positions % length, return_inverse=True)  # [C], [S]
        found = model(**inputs, logits_to_keep=columns)
        logits = found.logits[positions // length, kept]  # [S, vocabulary]

    targets = labels.flatten()[positions + 1]  # [S]
    total = functional.cross_entropy(logits.float(), targets, reduction="sum")
    if model.training and (balance := getattr(found, "aux_loss", None)) is not None:
        # The mean over a step's passes, each by its share of the supervised tokens.
        total = total + balance_coefficient(model) * balance * positions.numel()
    count = num_items if num_items is not None else max(1, positions.numel())
    return total / count


def balance_coefficient(model: Any) -> float:
    """The factor of a mixture's load-balancing loss, which transformers computes if the model's config.json says
    output_router_logits: true."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return float(getattr(base.config.get_text_config(), "router_aux_loss_coef", 0.0))


def takes_positions(model: Any) -> bool:
    """True if the model computes logits for chosen positions only (`logits_to_keep`)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
