"""The loss of supervised tokens through the fused head, for families whose head is a plain frozen linear layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from finetune_kernels.ops.blocked_cross_entropy import blocked_cross_entropy
from finetune_kernels.ops.linear_cross_entropy import linear_cross_entropy
from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_kernels.planning.families import family_of
from finetune_kernels.planning.fused_support import foreign_factor, logit_factor
from finetune_kernels.vocabulary.trained_rows import frozen_module, trained_rows


def has_plain_head(model: Any) -> bool:
    """True if the logits are head(hidden), with a factor that the family's row names and a softcap at most."""
    causal = causal_model(model)
    head = frozen_module(causal.get_output_embeddings())
    plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    config, family = causal.config, family_of(causal)
    is_known = family is not None or expert_family_of_type(config.model_type) is not None
    # A mixture's load-balancing loss is computed beside its logits.
    is_alone = not getattr(config, "output_router_logits", False)
    return plain and is_known and is_alone and foreign_factor(config, family) is None


def causal_model(model: Any) -> Any:
    """The transformers model inside peft's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fused_supervised_loss(
    model: Any,
    inputs: Mapping[str, Any],
    labels: torch.Tensor,
    positions: torch.Tensor,
    num_items: torch.Tensor | int | None,
) -> torch.Tensor:
    """Cross entropy summed over the supervised tokens, over `num_items` (None: their number).

    `labels` [B, T]; `positions` [S], the tokens p of the flattened batch whose label p + 1 counts. The model must
    pass `has_plain_head`.
    """
    causal = causal_model(model)
    hidden = causal.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[positions]  # [S, hidden]
    head = causal.get_output_embeddings()
    weight = frozen_module(head).weight  # [V, hidden], in host memory under the smallest memory plan
    softcap = getattr(causal.config, "final_logit_softcapping", None)

    # A factor of the logits is one of the head's inputs, which are fewer.
    if (factor := logit_factor(causal.config, family_of(causal))) != 1:
        hidden = hidden * factor

    hidden, targets = hidden.to(weight.dtype), labels.flatten()[positions + 1]
    if (trained := trained_rows(head)) is not None:
        total = linear_cross_entropy(hidden, weight, targets, softcap, trained)
    elif weight.device == hidden.device:
        total = linear_cross_entropy(hidden, weight, targets, softcap)
    else:
        total = blocked_cross_entropy(hidden, weight, targets, softcap)
    return total / (num_items if num_items is not None else max(1, positions.numel()))
