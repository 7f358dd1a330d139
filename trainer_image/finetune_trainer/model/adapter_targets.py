"""Chooses the linear layers that get an adapter, by their names in the model. Pure, and without PyTorch: preflight asks
too."""

from collections.abc import Collection, Iterable

from finetune_api.failures import FailureReason
from finetune_api.spec.training import ALL_LINEAR, DEFAULT_TARGETS, AdapterSpec
from finetune_api.vocabulary import AdapterVariant
from finetune_kernels.planning.families import family_of_type
from finetune_kernels.planning.family import LLAMA_NAMES
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.expert_files import COMMON, StoredExperts
from finetune_trainer.model.layer_weights import LayerWeight

FUSED = ("qkv_proj", "gate_up_proj")
"""Merged projections, which stand for the parts that the default names."""
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""Projections of latent attention (DeepSeek), which do as well."""
HEAD = "lm_head"

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")
"""Names that peft 0.21 moves to the stacked experts of a mixture, though shared experts and dense layers have them.

They are barred where our kernels do not know the experts.
"""
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_BARRED = ("out_proj",)
"""Layers of these model types that peft refuses: the Mamba kernels read their weights past the adapter."""
MAMBA_PAST_PEFT = ("bamba", "zamba2")
"""Model types of which the same is true, though peft does not refuse them."""


def barred_layers(weights: Iterable[LayerWeight], model_type: str | None) -> set[str]:
    """Last parts of the names of linear layers that peft cannot adapt in this model, or adapts elsewhere.

    Among them are those of modules that are no linear layer, to which peft would put an adapter as well: the layers
    `...adapter_list.1.0` of Zamba 2 are named as `model.layers.0` is.
    """
    weights = list(weights)
    modules = {part for weight in weights for part in weight.name.split(".")[:-1]}
    family = family_of_type(model_type or "")
    is_mamba = model_type in (*MAMBA_TYPES, *MAMBA_PAST_PEFT)
    barred = set(MAMBA_BARRED) if is_mamba else set(() if family is None else family.barred)
    barred |= {weight.last_name for weight in weights if weight.is_linear} & modules
    return barred | set(EXPERT_PARTS) if any(weight.is_stacked for weight in weights) else barred


def stand_ins(present: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Layers of the model that stand for others of the default: their names, and the names that they stand for."""
    # Names of a family's own count beside a q_proj only: GPT-2's c_proj is in both blocks.
    names = LLAMA_NAMES if "q_proj" in present else (*FUSED, *LATENT)
    return {name: LLAMA_NAMES[name] for name in names if name in present}


def choose_targets(
    present: Collection[str], wanted: tuple[str, ...], barred: Collection[str] = (), experts: Collection[str] = ()
) -> str | list[str]:
    """Module names for peft: the `wanted` ones that the model has, a fused layer in place of its parts.

    `present` are the last parts of the linear layers' names, `barred` those that get no adapter, `experts` the names
    that ask for experts, which peft does not see; the list is empty if only such are wanted. Raises TrainerError
    (InvalidConfiguration) if a name was asked for that the model does not have, or that is barred.
    """
    known = set(present) - {HEAD} - set(barred)
    if wanted == (ALL_LINEAR,):
        return sorted(known) if barred or experts else ALL_LINEAR  # which peft takes for the experts, too

    others = stand_ins(known)
    targets = [name for name in wanted if name in known]
    targets += [name for name, parts in others.items() if set(parts) <= set(wanted)]

    # The default may name layers that a family lacks; a user's own list may not.
    covered = {part for name in targets for part in others.get(name, ())}
    missing = [name for name in wanted if name not in known | covered | set(experts)]
    if (missing and wanted != DEFAULT_TARGETS) or not (targets or set(wanted) & set(experts)):
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, _explain(missing, present, known | set(experts)))
    return targets


def check_expert_targets(stored: StoredExperts | None, spec: AdapterSpec) -> None:
    """Raises TrainerError (InvalidConfiguration) for adapters on experts that cannot be made as the job writes them."""
    if stored is None:
        return

    wanted, targets = stored.wanted(spec.target_modules), set(spec.target_modules)
    if wanted and spec.variant is AdapterVariant.DORA:
        attention = [name for name in DEFAULT_TARGETS if name not in stored.answers()]
        message = (
            "spec.adapter.variant: DoRA cannot be put on the experts of this model: write LoRA or RSLoRA, or leave the "
            f"experts out with targetModules: [{', '.join(attention)}]"
        )
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)

    halves = {COMMON["gate"], COMMON["up"]}
    if stored.is_stacked and spec.target_modules != DEFAULT_TARGETS and len(halves & targets) == 1:
        message = (
            f"spec.adapter.targetModules: {next(iter(halves & targets))} of this model's experts lies in one tensor "
            f"with {next(iter(halves - targets))}: name both, or neither"
        )
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)


def _explain(missing: list[str], present: Collection[str], known: set[str]) -> str:
    refused = [name for name in missing if name in present]
    problem = f"peft cannot adapt {', '.join(refused)} in this model" if refused else ""
    if lacking := [name for name in missing if name not in present]:
        problem += f"{', and ' if problem else ''}the model has no layer {', '.join(lacking)}"
    return f"spec.adapter.targetModules: {problem}; choose from {', '.join(sorted(known))}"
