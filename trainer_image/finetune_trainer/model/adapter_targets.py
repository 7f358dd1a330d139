"""Chooses the linear layers that get an adapter, by their names in the model. Pure, and without PyTorch: preflight asks
too."""

from collections.abc import Collection, Iterable

from finetune_api.failures import FailureReason
from finetune_api.spec.training import ALL_LINEAR, DEFAULT_TARGETS
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.safetensors_header import TensorHeader

# Families that fuse projections: the fused layer stands for the parts that the default names.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
HEAD = "lm_head"


def linear_names(weights: Iterable[TensorHeader]) -> set[str]:
    """Last parts of the linear layers' names, such as q_proj, by the weights that a model's files hold."""
    matrices = (tensor.name.removesuffix(".weight") for tensor in weights if _is_matrix(tensor))
    parts = {name.rsplit(".", 1)[-1] for name in matrices}
    return {part for part in parts if "norm" not in part and "embed" not in part}


def _is_matrix(tensor: TensorHeader) -> bool:
    return tensor.name.endswith(".weight") and len(tensor.shape) == 2


def choose_targets(present: Collection[str], wanted: tuple[str, ...]) -> str | list[str]:
    """Module names for peft: the `wanted` ones that the model has, a fused layer in place of its parts.

    `present` are the last parts of the linear layers' names. Raises TrainerError (InvalidConfiguration) if a name was
    asked for that the model does not have.
    """
    if wanted == (ALL_LINEAR,):
        return ALL_LINEAR

    known = set(present) - {HEAD}
    targets = [name for name in wanted if name in known]
    targets += [fused for fused, parts in FUSED.items() if fused in known and set(parts) <= set(wanted)]

    # The default may name layers that a family lacks; a user's own list may not.
    covered = {part for fused in targets for part in FUSED.get(fused, ())}
    missing = [name for name in wanted if name not in known and name not in covered]
    if (missing and wanted != DEFAULT_TARGETS) or not targets:
        message = (
            f"spec.adapter.targetModules: the model has no layer {', '.join(missing)}; "
            f"choose from {', '.join(sorted(known))}"
        )
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
    return targets
