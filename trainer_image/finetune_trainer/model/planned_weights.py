"""The weights as the job will load them: which get an adapter, which are in NF4, and how much memory all take. Pure."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from finetune_api.run_config import RunConfig
from finetune_api.spec.training import ALL_LINEAR
from finetune_api.vocabulary import Quantization
from finetune_kernels.planning.loaded_weights import ADAPTER_BYTES, NF4_BLOCK, SCALES_BLOCK
from finetune_trainer.chat.new_tokens import EMBEDDING, HEAD
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.adapter_targets import LinearLayers, check_expert_targets, choose_targets
from finetune_trainer.model.coverage import Coverage, adapted_layers, measure_coverage
from finetune_trainer.model.layer_weights import LayerWeight, known_experts, layer_weights
from finetune_trainer.model.safetensors_header import TensorHeader


@dataclass(frozen=True)
class PlannedWeights:
    """Weights of a model that is not loaded."""

    coverage: Coverage
    with_all_linear: Coverage
    """The coverage with targetModules: [all-linear]."""
    missing: Sequence[str]
    """Default targets that the model lacks or that peft cannot adapt there."""
    own_default: Sequence[str]
    """Linear layers of a model that has none of the default's names, all of which get an adapter by default."""
    left_out: Sequence[str]
    """Names of linear layers that could have an adapter and do not, those with the most weights first."""
    loaded_bytes: int
    """Bytes of all weights once they are loaded, adapters included."""
    adapter_parameters: int
    """Parameters that train."""
    expert_rank: int
    """Rank of adapters on experts, if there are any."""
    published_parameters: int
    """Parameters in the adapter's file, in which adapters on experts are filled up to the rank of the others."""


def plan_weights(
    headers: Iterable[TensorHeader], config: RunConfig, model_type: str | None, *, chosen: int, each: int = 2
) -> PlannedWeights | None:
    """The weights of the job; None if its targetModules name layers that the model lacks, which is an error then.

    `chosen`: experts that a token goes through, 0 for a model without; `each`: bytes of a weight that is not in NF4.
    """
    headers = list(headers)
    nf4 = config.model.quantization is Quantization.NF4
    weights = layer_weights(headers, quantized=nf4, model_type=model_type)
    wanted = config.adapter.target_modules
    stored = next(iter(known_experts(headers, model_type).values()), None)
    layers = LinearLayers.of(weights, model_type, stored)

    def adapted_by(targets: tuple[str, ...]) -> set[str]:
        linear = choose_targets(layers, targets)
        return adapted_layers(weights, linear, stored.wanted(targets) if stored else ())

    try:
        adapted, all_linear = adapted_by(wanted), adapted_by((ALL_LINEAR,))
        check_expert_targets(stored, config.adapter)
    except TrainerError:
        return None

    rank, of_experts = config.adapter.rank, config.adapter.rank_of_experts(chosen)
    trained = _adapter_parameters(weights, adapted, rank, of_experts)
    trained += _new_rows(headers, len(config.model.new_tokens))
    return PlannedWeights(
        measure_coverage(weights, adapted),
        measure_coverage(weights, all_linear),
        layers.missing_defaults(wanted),
        layers.own_default(wanted),
        _left_out(weights, adapted, layers.barred),
        _base_bytes(headers, weights, config, each) + ADAPTER_BYTES * trained,
        trained,
        of_experts,
        _adapter_parameters(weights, adapted, rank, rank),
    )


def _left_out(weights: Iterable[LayerWeight], adapted: set[str], barred: Collection[str]) -> list[str]:
    sizes: dict[str, int] = {}
    for weight in weights:
        if weight.is_linear and weight.name not in adapted and weight.last_name not in barred:
            sizes[weight.last_name] = sizes.get(weight.last_name, 0) + weight.parameters
    return sorted(sizes, key=lambda name: -sizes[name])


def _base_bytes(headers: Iterable[TensorHeader], weights: Iterable[LayerWeight], config: RunConfig, each: int) -> int:
    quantized = {weight.name for weight in weights if weight.is_quantized}
    return sum(_loaded_bytes(header, quantized, each, double=config.model.double_quantization) for header in headers)


def _loaded_bytes(header: TensorHeader, quantized: set[str], each: int, *, double: bool) -> int:
    if header.dtype == "U8" or ".weight." in header.name:
        return header.end - header.start  # in NF4 already: the codes, or a part beside them
    if header.name.removesuffix(".weight") not in quantized:
        return each * header.parameters

    scales = header.parameters // NF4_BLOCK
    return header.parameters // 2 + (scales + 4 * scales // SCALES_BLOCK if double else 4 * scales)


def _new_rows(headers: Iterable[TensorHeader], tokens: int) -> int:
    """Parameters of the rows of new tokens in embedding and head."""
    return sum(tokens * header.shape[-1] for header in headers if header.name in (EMBEDDING, HEAD))


def _adapter_parameters(weights: Iterable[LayerWeight], adapted: set[str], rank: int, of_experts: int) -> int:
    # A [r, in] and B [out, r]; of each expert in a stack [E, out, in].
    return sum(
        (rank if weight.expert_part is None else of_experts) * sum(weight.shape[-2:]) * math.prod(weight.shape[:-2])
        for weight in weights
        if weight.name in adapted and weight.shape is not None
    )
