"""Chooses the linear layers that get an adapter, by their names in the model. Pure, and without PyTorch: preflight asks
too."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from finetune_api.failures import FailureReason
from finetune_api.spec.training import ALL_LINEAR, DEFAULT_TARGETS, AdapterSpec
from finetune_api.vocabulary import AdapterVariant
from finetune_kernels.planning.families import family_of_type
from finetune_kernels.planning.family import LLAMA_NAMES
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.expert_files import COMMON, StoredExperts
from finetune_trainer.model.layer_weights import LayerWeight, linear_names

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
MAMBA_PAST_PEFT = ("zamba2",)
"""Model types without a row of ours of which the same is true, though peft does not refuse them."""
MAMBA_1_TYPES, MAMBA_1_BARRED = ("mamba", "falcon_mamba"), ("x_proj", "dt_proj")
"""Of the first Mamba, kernels and the code in their place read these layers' weights past the adapter as well."""
TRANSPOSED_TYPES = ("gpt2", "openai-gpt")
"""Model types that keep their layers as [in, out] (transformers' Conv1D), which no merge knows; they have no
default."""
ATTENTION_ENDS = ("q_proj", "o_proj")
"""Names of what attention reads and writes."""


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers of a model, by the last parts of their names."""

    present: frozenset[str]
    barred: frozenset[str] = frozenset()
    """Those that get no adapter."""
    experts: frozenset[str] = frozenset()
    """Names that ask for experts, which peft does not see."""
    are_transposed: bool = False
    """True if the files keep them as [in, out]."""

    @classmethod
    def of(
        cls, weights: Iterable[LayerWeight], model_type: str | None, stored: StoredExperts | None = None
    ) -> "LinearLayers":
        """Returns those of a model's weights; `stored`: its experts, if our kernels know them."""
        weights = list(weights)
        return cls(
            frozenset(linear_names(weights)),
            frozenset(barred_layers(weights, model_type)),
            frozenset(stored.answers() if stored else ()),
            model_type in TRANSPOSED_TYPES,
        )

    @property
    def known(self) -> frozenset[str]:
        """Layers that can get an adapter."""
        return self.present - {HEAD} - self.barred

    @property
    def has_own_default(self) -> bool:
        """True if the default is all linear layers: of a model that does not say by Llama's names, or by others that
        stand for them, what attention reads and writes (GPT-NeoX, Falcon)."""
        covered = {part for parts in stand_ins(self.known).values() for part in parts} | self.known
        return not self.are_transposed and not covered >= set(ATTENTION_ENDS)

    def own_default(self, wanted: tuple[str, ...]) -> list[str]:
        """Returns all linear layers that get an adapter if the default is `wanted` and is the family's own; else
        none."""
        return sorted(self.known) if wanted == DEFAULT_TARGETS and self.has_own_default else []

    def missing_defaults(self, wanted: tuple[str, ...]) -> list[str]:
        """Returns the default targets that the model lacks, in order; none if the user names layers, or if the
        default is the family's own."""
        if wanted != DEFAULT_TARGETS or self.has_own_default:
            return []
        known = (self.present - self.barred) | self.experts
        covered = {part for parts in stand_ins(known).values() for part in parts}
        return [name for name in wanted if name not in known and name not in covered]


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
    barred |= set(MAMBA_1_BARRED) if model_type in MAMBA_1_TYPES else set()
    barred |= {weight.last_name for weight in weights if weight.is_linear} & modules
    return barred | set(EXPERT_PARTS) if any(weight.is_stacked for weight in weights) else barred


def stand_ins(present: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Layers of the model that stand for others of the default: their names, and the names that they stand for."""
    # Names of a family's own count beside a q_proj only: GPT-2's c_proj is in both blocks.
    names = LLAMA_NAMES if "q_proj" in present else (*FUSED, *LATENT)
    return {name: LLAMA_NAMES[name] for name in names if name in present}


def choose_targets(layers: LinearLayers, wanted: tuple[str, ...]) -> str | list[str]:
    """Module names for peft: the `wanted` ones that the model has, a fused layer in place of its parts.

    The list is empty if only experts are wanted. Raises TrainerError (InvalidConfiguration) if a name was asked for
    that the model does not have, or that is barred.
    """
    known = layers.known
    if wanted == (ALL_LINEAR,):
        return sorted(known) if layers.barred or layers.experts else ALL_LINEAR  # which peft takes for the experts, too

    others = stand_ins(known)
    targets = [name for name in wanted if name in known]
    targets += [name for name, parts in others.items() if set(parts) <= set(wanted)]
    targets = layers.own_default(wanted) or targets

    # The default may name layers that a family lacks; a user's own list may not.
    covered = {part for name in targets for part in others.get(name, ())}
    missing = [name for name in wanted if name not in known | covered | layers.experts]
    if (missing and wanted != DEFAULT_TARGETS) or not (targets or set(wanted) & layers.experts):
        raise TrainerError(
            FailureReason.INVALID_CONFIGURATION, _explain(missing, layers.present, known | layers.experts)
        )
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


def _explain(missing: list[str], present: Collection[str], known: Collection[str]) -> str:
    refused = [name for name in missing if name in present]
    problem = f"peft cannot adapt {', '.join(refused)} in this model" if refused else ""
    if lacking := [name for name in missing if name not in present]:
        problem += f"{', and ' if problem else ''}the model has no layer {', '.join(lacking)}"
    return f"spec.adapter.targetModules: {problem}; choose from {', '.join(sorted(known))}"
