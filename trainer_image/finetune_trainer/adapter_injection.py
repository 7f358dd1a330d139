"""Stage 2: the low-rank adapter; everything else is frozen."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from finetune_api.failures import FailureReason
from finetune_api.spec_training import ALL_LINEAR, DEFAULT_TARGETS, AdapterSpec
from finetune_api.vocabulary import AdapterVariant
from finetune_trainer.errors import TrainerError

# Families that fuse projections: the fused layer stands for the parts that the default names.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class AdaptedModel:
    """The model with its adapter."""

    model: Any
    """peft's PeftModel."""
    trainable_parameters: int
    total_parameters: int
    """Parameters of base and adapter, counted as if the base were not quantised."""


def inject_adapter(model: Any, spec: AdapterSpec, seed: int) -> AdaptedModel:
    """Wrap the linear layers that the spec names. Raises TrainerError (InvalidConfiguration) for names the model
    lacks."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=spec.dropout,
        target_modules=choose_targets(model, spec.target_modules),
        use_rslora=spec.variant is AdapterVariant.RSLORA,
        use_dora=spec.variant is AdapterVariant.DORA,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    trainable, total = adapted.get_nb_trainable_parameters()
    return AdaptedModel(adapted, int(trainable), int(total))


def choose_targets(model: Any, wanted: tuple[str, ...]) -> str | list[str]:
    """Module names for peft: the wanted ones, with fused layers in place of the parts that a family does not have."""
    if wanted == (ALL_LINEAR,):
        return ALL_LINEAR
    present = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    present.discard("lm_head")
    targets = [name for name in wanted if name in present]
    targets += [fused for fused, parts in FUSED.items() if fused in present and set(parts) <= set(wanted)]
    covered = {part for fused in targets for part in FUSED.get(fused, ())}
    missing = [name for name in wanted if name not in present and name not in covered]
    if (missing and wanted != DEFAULT_TARGETS) or not targets:
        message = (
            f"spec.adapter.targetModules: the model has no {', '.join(missing)}; it has {', '.join(sorted(present))}"
        )
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
    return targets
