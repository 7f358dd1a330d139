"""Stage 2: injects the LoRA adapter, whose parameters are the only ones that train."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from finetune_api.spec.training import AdapterSpec
from finetune_api.vocabulary import AdapterVariant
from finetune_trainer.model.adapter_targets import barred_layers, choose_targets
from finetune_trainer.model.coverage import ENOUGH, Coverage, measure_coverage, missing_defaults
from finetune_trainer.model.layer_weights import LayerWeight, is_stack, is_vocabulary, linear_names

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptedModel:
    """The model with its adapter, and how much of it trains."""

    model: Any
    """peft's PeftModel."""
    trainable_parameters: int
    total_parameters: int
    """Parameters of base and adapter, counted as if the base were not quantised."""
    coverage: Coverage


def inject_adapter(model: Any, spec: AdapterSpec, seed: int) -> AdaptedModel:
    """Wraps the linear layers that the spec names, with weights drawn from `seed`.

    Raises TrainerError (InvalidConfiguration) for names that the model lacks.
    """
    torch.manual_seed(seed)
    weights = _layer_weights(model)
    present, barred = linear_names(weights), barred_layers(weights, model.config.model_type)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=spec.dropout,
        target_modules=choose_targets(present, spec.target_modules, barred),
        use_rslora=spec.variant is AdapterVariant.RSLORA,
        use_dora=spec.variant is AdapterVariant.DORA,
        task_type="CAUSAL_LM",
    )

    adapted = get_peft_model(model, config)
    trainable, total = adapted.get_nb_trainable_parameters()
    coverage = measure_coverage(weights, set(_targeted(adapted)))
    _report(coverage, missing_defaults(present - barred, spec.target_modules))
    return AdaptedModel(adapted, int(trainable), int(total), coverage)


def _targeted(adapted: Any) -> list[str]:
    """Names of the layers that got an adapter."""
    found: list[str] = adapted.base_model.targeted_module_names
    return found


def _report(coverage: Coverage, missing: list[str]) -> None:
    lacking = f" (the model has no {', '.join(missing)})" if missing else ""
    level = logging.INFO if coverage.adapted_share >= ENOUGH else logging.WARNING
    log.log(level, "%s%s", coverage.sentence(), lacking)


def _layer_weights(model: Any) -> list[LayerWeight]:
    """The layers' weights of a loaded model."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue

        for name, parameter in module.named_parameters(recurse=False):
            whole, state = f"{path}.{name}", getattr(parameter, "quant_state", None)
            shape = tuple(parameter.shape if state is None else state.shape)  # NF4 packs two weights in a byte
            if len(shape) > 1 and not is_vocabulary(whole):
                found.append(
                    LayerWeight(
                        whole.removesuffix(".weight"),
                        math.prod(shape),
                        shape,
                        is_linear=isinstance(module, torch.nn.Linear),
                        is_stacked=is_stack(whole, shape),
                        is_quantized=state is not None,
                    )
                )

    return found
