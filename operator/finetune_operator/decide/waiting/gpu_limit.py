"""The GPUs that a namespace may use at a time, by the chart's value maxGpusPerNamespace (pure).

A job waits before its trainer's Job is made, or is resumed: after its checks, so that mistakes are found meanwhile. The
line is the order of creation, and a small job does not overtake a large one, which might otherwise wait for ever.
"""

from collections.abc import Sequence

from finetune_operator.desired.names import TRAINER
from finetune_operator.observe.snapshot import ChildRun, GpuUse, GpuUser, Snapshot, Waiting
from finetune_operator.status_reasons import StatusReason

LIMIT_VALUE = "maxGpusPerNamespace"
NEXT_LOOK_SECONDS = 30.0
FAR_LOOK_SECONDS = 300.0
"""Time until the next look of the first ten in the line, and of those behind them. Whoever frees GPUs has the first ten
looked at anyway; these looks are for events that are lost."""

FIRST_IN_LINE = 10
_NAMED = 5  # jobs that a message names


def find_gpu_wait(snapshot: Snapshot, run: ChildRun) -> Waiting | None:
    """Finds that a run may not take its GPUs yet; None if it may, or if it has them."""
    use, wanted = snapshot.gpu_use, snapshot.spec.resources.all_gpus
    if use is None or run.component != TRAINER or wanted + _sum(use.using) + _sum(use.ahead) <= use.limit:
        return None
    return Waiting(StatusReason.GPU_LIMIT_REACHED, _describe(snapshot, use, wanted))


def seconds_until_next_gpu_look(snapshot: Snapshot, run: ChildRun) -> float | None:
    """Returns the seconds after which to look again at a run that waits for GPUs; None for any other."""
    if snapshot.gpu_use is None or find_gpu_wait(snapshot, run) is None:
        return None
    return NEXT_LOOK_SECONDS if len(snapshot.gpu_use.ahead) < FIRST_IN_LINE else FAR_LOOK_SECONDS


def _describe(snapshot: Snapshot, use: GpuUse, wanted: int) -> str:
    namespace = snapshot.metadata.namespace
    allowed = f"jobs of namespace {namespace} may use {_gpus(use.limit)} at a time ({LIMIT_VALUE})"
    parts = [f"{allowed}, and this one asks for {wanted}"]
    if use.using:
        parts.append(f"in use: {_gpus(_sum(use.using))} by {_names(use.using)}")
    if use.ahead:
        parts.append(f"first in line, as created earlier: {_names(use.ahead)}")
    advice = "It starts by itself. To make room, suspend or delete one of these jobs"
    return f"{'; '.join(parts)}. {advice}"


def _sum(users: Sequence[GpuUser]) -> int:
    return sum(user.gpus for user in users)


def _gpus(number: int) -> str:
    return f"{number} GPU" if number == 1 else f"{number} GPUs"


def _names(users: Sequence[GpuUser]) -> str:
    named = ", ".join(f"{user.name} ({user.gpus})" for user in users[:_NAMED])
    return named + (f" and {len(users) - _NAMED} more" if len(users) > _NAMED else "")
