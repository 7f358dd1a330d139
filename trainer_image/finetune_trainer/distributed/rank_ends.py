"""Ends of a run's ranks: what one says of its own failure, and what its exit code tells where it said nothing."""

import signal
from pathlib import Path

from torch.distributed import DistError

from finetune_api.base import ApiModel
from finetune_api.failures import FailureReason
from finetune_trainer.errors import RankError, TrainerError

SAME_EVERYWHERE = (
    FailureReason.INTERRUPTED,
    FailureReason.NON_FINITE_LOSS,
    FailureReason.LOSS_DIVERGED,
    FailureReason.NOTHING_LEARNED,
)
"""Ends that all ranks find at the same step: rank 0 says them, and does what is due."""

MEMORY_EVENTS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
"""Files in which the kernel counts processes of the pod that it has killed for their memory: cgroup v2 and v1."""


class RankFailure(ApiModel):
    """Reason and message of a rank that failed."""

    reason: FailureReason
    message: str


def explain_end(who: str, failure_file: Path, code: int, *, memory_ran_out: bool) -> RankError:
    """Returns why a rank ended with an exit code other than 0. `who`: its name in the message; `memory_ran_out`: the
    kernel has killed a process of the pod for its memory."""
    try:
        failure = RankFailure.model_validate_json(failure_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if code == -signal.SIGKILL and memory_ran_out:
            message = f"{who} was killed as the pod's memory ran out: raise spec.resources.memory"
            return RankError(FailureReason.OUT_OF_MEMORY, message)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return RankError(FailureReason.INTERNAL_ERROR, f"{who} {how}, see the trainer's log")
    return RankError(failure.reason, f"{who}: {failure.message}")


def count_memory_kills(files: tuple[Path, ...] = MEMORY_EVENTS) -> int:
    """Returns how many processes of this pod the kernel has killed for their memory; 0 where it does not say."""
    for file in files:
        try:
            counts = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
            return int(counts.get("oom_kill", "0"))
        except (OSError, ValueError):
            continue
    return 0


def name_rank(error: TrainerError, rank: int, size: int) -> TrainerError:
    """Returns the error with the rank's name before its message; in a run of one process, as it is."""
    return error if size == 1 else RankError(error.reason, f"rank {rank} of {size}: {error.message}")


def is_lost_connection(error: BaseException) -> bool:
    """True for an error of gloo, NCCL or the store, which says only that another rank is gone."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
