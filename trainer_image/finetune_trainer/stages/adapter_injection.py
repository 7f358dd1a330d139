"""Stage 2: injects the LoRA adapter, whose parameters are the only ones that train."""

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers.pytorch_utils import Conv1D

from finetune_api.spec.training import AdapterSpec
from finetune_api.vocabulary import AdapterVariant
from finetune_kernels.experts.replacing import stacked_experts
from finetune_kernels.experts.routers import router_paths
from finetune_kernels.vocabulary.trained_rows import install_trained_rows
from finetune_trainer.model.adapter_targets import LinearLayers, check_expert_targets, choose_targets
from finetune_trainer.model.coverage import ENOUGH, Coverage, measure_coverage
from finetune_trainer.model.layer_weights import LayerWeight, is_layer_weight, is_router_name, is_stack
from finetune_trainer.stages.expert_injection import (
    add_expert_adapters,
    expert_rank,
    expert_weights,
    named_experts,
    peft_without_experts,
    zeros_when_published,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptedModel:
    """The model with its adapter, and how much of it trains."""

    model: Any
    """peft's PeftModel."""
    trainable_parameters: int
    total_parameters: int
    """Parameters of base and adapter, counted as if the base were not quantised."""
    published_parameters: int
    """Parameters in the adapter's file, in which adapters on experts are filled up to the rank of the others."""
    expert_rank: int | None
    """Rank of adapters on experts; None if they have none."""
    coverage: Coverage


def inject_adapter(model: Any, spec: AdapterSpec, seed: int, new_tokens: tuple[int, ...] = ()) -> AdaptedModel:
    """Wraps the linear layers that the spec names, with weights drawn from `seed`, and the rows of `new_tokens` in
    embedding and head.

    Raises TrainerError (InvalidConfiguration) for names that the model lacks.
    """
    torch.manual_seed(seed)
    weights, experts = _layer_weights(model), named_experts(model)
    stored = experts[0].stored_experts if experts else None
    layers = LinearLayers.of(weights, model.config.model_type, stored)
    check_expert_targets(stored, spec)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=spec.dropout,
        target_modules=choose_targets(layers, spec.target_modules) or DUMMY_TARGET_MODULES,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        use_rslora=spec.variant is AdapterVariant.RSLORA,
        use_dora=spec.variant is AdapterVariant.DORA,
        task_type="CAUSAL_LM",
        trainable_token_indices=_trained_indices(model, new_tokens),
    )

    with peft_without_experts(has_ours=bool(experts)):
        adapted = get_peft_model(model, config)
    install_trained_rows(model)
    # Or peft saves the whole embedding, frozen as it is, of a vocabulary that has grown.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]
    names = add_expert_adapters(model, spec)
    trainable, total = adapted.get_nb_trainable_parameters()
    total += sum(module.parameters_count for _, module in stacked_experts(model))
    coverage = measure_coverage(weights, {*_targeted(adapted), *names})
    _report(coverage, layers.missing_defaults(spec.target_modules))
    published = int(trainable) + zeros_when_published(model, spec.rank)
    return AdaptedModel(adapted, int(trainable), int(total), published, expert_rank(model), coverage)


def _trained_indices(model: Any, new_tokens: tuple[int, ...]) -> dict[str, list[int]] | None:
    """Rows that train by the name of their layer, as peft takes them; a tied head has those of the embedding."""
    if not new_tokens:
        return None
    layers = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    return {layer: list(new_tokens) for layer in layers}


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
    found, routers = [], tuple(f"{path}." for path in router_paths(model))
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue

        for name, parameter in module.named_parameters(recurse=False):
            whole, state = f"{path}.{name}", getattr(parameter, "quant_state", None)
            shape = tuple(parameter.shape if state is None else state.shape)  # NF4 packs two weights in a byte
            if is_layer_weight(whole, shape):
                found.append(
                    LayerWeight(
                        whole.removesuffix(".weight"),
                        math.prod(shape),
                        shape,
                        is_linear=isinstance(module, torch.nn.Linear | Conv1D)
                        and not is_router_name(path)
                        and not type(module).__name__.endswith("Router")
                        and not path.startswith(routers),
                        is_stacked=is_stack(whole, shape),
                        is_quantized=state is not None,
                    )
                )

    return found + expert_weights(model)
