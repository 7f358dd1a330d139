"""Chooses the linear layers that get an adapter, by their names in the model. Pure, and without PyTorch: preflight asks
too."""

from collections.abc import Collection, Iterable

from finetune_api.failures import FailureReason
from finetune_api.spec.training import ALL_LINEAR, DEFAULT_TARGETS
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.layer_weights import LayerWeight

# Families that fuse projections: the fused layer stands for the parts that the default names.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
HEAD = "lm_head"

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")
"""Names that peft 0.21 moves to the stacked experts of a mixture, though shared experts and dense layers have them.

Adapters on stacked experts can neither be merged nor served.
"""
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_BARRED = ("out_proj",)
"""Layers of these model types that peft refuses: the Mamba kernels read their weights past the adapter."""


def barred_layers(weights: Iterable[LayerWeight], model_type: str | None) -> set[str]:
    """Last parts of the names of linear layers that peft cannot adapt in this model, or adapts elsewhere."""
    barred = set(MAMBA_BARRED) if model_type in MAMBA_TYPES else set()
    return barred | set(EXPERT_PARTS) if any(weight.is_stacked for weight in weights) else barred


def choose_targets(present: Collection[str], wanted: tuple[str, ...], barred: Collection[str] = ()) -> str | list[str]:
    """Module names for peft: the `wanted` ones that the model has, a fused layer in place of its parts.

    `present` are the last parts of the linear layers' names, `barred` those that get no adapter. Raises TrainerError
    (InvalidConfiguration) if a name was asked for that the model does not have, or that is barred.
    """
    known = set(present) - {HEAD} - set(barred)
    if wanted == (ALL_LINEAR,):
        return sorted(known) if barred else ALL_LINEAR  # which peft takes for the experts, too

    targets = [name for name in wanted if name in known]
    targets += [fused for fused, parts in FUSED.items() if fused in known and set(parts) <= set(wanted)]

    # The default may name layers that a family lacks; a user's own list may not.
    covered = {part for fused in targets for part in FUSED.get(fused, ())}
    missing = [name for name in wanted if name not in known and name not in covered]
    if (missing and wanted != DEFAULT_TARGETS) or not targets:
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, _explain(missing, present, known))
    return targets


def _explain(missing: list[str], present: Collection[str], known: set[str]) -> str:
    refused = [name for name in missing if name in present]
    problem = f"peft cannot adapt {', '.join(refused)} in this model" if refused else ""
    if lacking := [name for name in missing if name not in present]:
        problem += f"{', and ' if problem else ''}the model has no layer {', '.join(lacking)}"
    return f"spec.adapter.targetModules: {problem}; choose from {', '.join(sorted(known))}"
