"""Rows of a run on several nodes: every pod fetches and formats its own, which must be those of the first pod.

Sources may change between two reads. A run whose pods train on different models or rows would give a result that
nobody asked for, so they compare what they have read before the first step.
"""

from typing import Any

from finetune_api.failures import FailureReason
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import TrainerError

Inputs = dict[str, Any]
"""What a pod has read: digests of sources and numbers of rows, by name."""


def share_rows(world: World, data: Any, inputs: Inputs | None) -> Any:
    """Returns the formatted rows that a rank trains on. On one node, all take rank 0's. `inputs`: what this rank's pod
    has read; None for a rank that takes what its pod's first rank has compared.

    Raises TrainerError (InternalError) if the first pod has read something else.
    """
    if world.nodes == 1:
        return world.copy_object(data)

    first = world.copy_object(inputs)
    if inputs is None or inputs == first:
        return data
    different = ", ".join(f"{name} ({inputs[name]} and {first[name]})" for name in first if first[name] != inputs[name])
    raise TrainerError(
        FailureReason.INTERNAL_ERROR,
        f"this pod has read other inputs than the first one: {different}. The sources have changed meanwhile; pin "
        "spec.model.revision, and do not write to the dataset while jobs start",
    )
