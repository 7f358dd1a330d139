"""Stage 2: injects the LoRA adapter, whose parameters are the only ones that train."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from finetune_api.spec.training import AdapterSpec
from finetune_api.vocabulary import AdapterVariant
from finetune_trainer.model.adapter_targets import choose_targets


@dataclass(frozen=True)
class AdaptedModel:
    """The model with its adapter, and how much of it trains."""

    model: Any
    """peft's PeftModel."""
    trainable_parameters: int
    total_parameters: int
    """Parameters of base and adapter, counted as if the base were not quantised."""


def inject_adapter(model: Any, spec: AdapterSpec, seed: int) -> AdaptedModel:
    """Wraps the linear layers that the spec names, with weights drawn from `seed`.

    Raises TrainerError (InvalidConfiguration) for names that the model lacks.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=spec.dropout,
        target_modules=choose_targets(_linear_names(model), spec.target_modules),
        use_rslora=spec.variant is AdapterVariant.RSLORA,
        use_dora=spec.variant is AdapterVariant.DORA,
        task_type="CAUSAL_LM",
    )

    adapted = get_peft_model(model, config)
    trainable, total = adapted.get_nb_trainable_parameters()
    return AdaptedModel(adapted, int(trainable), int(total))


def _linear_names(model: Any) -> set[str]:
    """Last part of each linear layer's name, such as q_proj."""
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
