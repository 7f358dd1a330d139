"""Turns the end of a run into its outcome: the termination message, which the operator reads, and the exit code."""

import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.failures import ExitCode, FailureReason, exit_code_of
from finetune_api.outcome import Outcome, Result
from finetune_api.vocabulary import Stage
from finetune_trainer.artifacts.failed_exports import explain_failed_exports
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.distributed.nodes.place import Place
from finetune_trainer.errors import InterruptedRunError, OtherNodeError, TrainerError
from finetune_trainer.job.disk_needs import DiskNeed, describe_needs
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.watchdog import Stall
from finetune_trainer.storage.disk_faults import DiskFullError, explain_disk_fault

log = logging.getLogger(__name__)

OUT_OF_MEMORY = (FailureReason.CUDA_OUT_OF_MEMORY, FailureReason.OUT_OF_MEMORY)
"""Ends of one rank of a run, as a rule: the others have room, or have not come so far."""


def published(
    manifest: Manifest, manifest_uri: str, progress: ProgressTracker, *, reused: bool, hub_url: str | None = None
) -> Outcome:
    """Outcome of a committed result, pushed to `hub_url` if the job asks for that.

    It is a success unless an export failed: that must not be overlooked, though everything else is published.
    """
    best_step = manifest.metrics.get("bestStep")
    reason = FailureReason.EXPORT_FAILED if manifest.failed_exports else None
    reused_message = "a finished result of the same specification was found" if reused else ""

    return Outcome(
        result=Result.SUCCEEDED if reason is None else Result.FAILED,
        reason=reason,
        message=reused_message if reason is None else explain_failed_exports(manifest),
        exit_code=ExitCode.SUCCESS if reason is None else exit_code_of(reason),
        stage=progress.current_stage,
        loss=_rounded(manifest.metrics.get("loss")),
        eval_loss=_rounded(manifest.metrics.get("evalLoss")),
        best_step=None if best_step is None else int(best_step),
        best_eval_loss=_rounded(manifest.metrics.get("bestEvalLoss")),
        stopped_early=True if manifest.metrics.get("stoppedEarly") else None,
        memory=progress.memory,
        energy_joules=progress.energy_joules,
        reused=reused,
        manifest_uri=manifest_uri,
        hub_url=hub_url,
        artifacts=tuple(artifact.as_artifact() for artifact in manifest.artifacts),
        failed_exports=manifest.failed_exports,
        judgement=manifest.judgement,
        finished=datetime.now(UTC),
        **_position(progress),
    )


def failed(error: BaseException, progress: ProgressTracker, work: Path | None = None) -> Outcome:
    """Outcome of a run that ended with an error; `work` is the folder that it wrote to."""
    reason, message = explain(error, work, progress.disk_needs)
    size = progress.resolved.world_size
    if size and reason in OUT_OF_MEMORY and not message.startswith(("rank", "node")):
        message = f"rank 0 of {size}: {message}"

    return Outcome(
        result=Result.INTERRUPTED if reason is FailureReason.INTERRUPTED else Result.FAILED,
        reason=reason,
        message=message,
        exit_code=error.exit_code if isinstance(error, OtherNodeError) else exit_code_of(reason),
        stage=progress.current_stage,
        loss=progress.value("loss"),
        eval_loss=progress.value("eval_loss"),
        best_step=progress.value("best_step"),
        best_eval_loss=progress.value("best_eval_loss"),
        stopped_early=progress.value("stopped_early"),
        memory=progress.memory,
        energy_joules=progress.energy_joules,
        finished=datetime.now(UTC),
        **_position(progress),
    )


def followed(progress: ProgressTracker, place: Place) -> Outcome:
    """Outcome of a pod that has trained along, in a run on several nodes: the result is the first pod's to tell."""
    message = f"{place} has trained along; the first pod has published the result"
    return Outcome(result=Result.SUCCEEDED, message=message, finished=datetime.now(UTC), **_position(progress))


def overdue(progress: ProgressTracker) -> Outcome:
    """Outcome of a run that did not end by itself after a signal: that of its newest checkpoint."""
    message = f"stopped in the middle of its work; {_newest_checkpoint(progress)}"
    return failed(InterruptedRunError(message), progress)


def stalled(progress: ProgressTracker, stall: Stall, *, has_others: bool = False) -> Outcome:
    """Outcome of a run that did nothing any more. `has_others`: other ranks train along, which it may wait for."""
    step, stage = progress.value("step"), progress.current_stage
    place = f" in stage {stage}" if stage else ""
    after = f" after step {step}" if step is not None else ""
    message = describe_stall(stall, f"{place}{after}")
    reason = FailureReason.STALLED
    if has_others and stage is Stage.TRAINING:
        reason, message = (
            FailureReason.COLLECTIVE_TIMEOUT,
            f"{message}, for another rank: the log has all ranks' stacks",
        )
    return failed(TrainerError(reason, f"{message}; {_newest_checkpoint(progress)}"), progress)


def describe_stall(stall: Stall, where: str = "") -> str:
    """Returns the sentence about a run that did nothing any more; `where`: stage and step, as they stand in it."""
    return f"the run did nothing for {stall.seconds} s{where}; it waits at {stall.frame}"


def explain(
    error: BaseException, work: Path | None = None, needs: Sequence[DiskNeed] = ()
) -> tuple[FailureReason, str]:
    """Returns reason and message of an error; `work` is the folder that the run writes to, `needs` what it writes.

    Our own errors carry both. Any other is a defect: its text stays in the log, as it may hold a secret.
    """
    if _is_gpu_memory_error(error):
        return FailureReason.CUDA_OUT_OF_MEMORY, "the run does not fit the GPU's memory"
    if isinstance(error, MemoryError):
        return FailureReason.OUT_OF_MEMORY, "the run does not fit the host's memory"

    failure = error if isinstance(error, TrainerError) else explain_disk_fault(error, work)
    if isinstance(failure, DiskFullError) and needs:
        return failure.reason, f"{failure.message}; what the job writes there takes {describe_needs(needs)}"
    if failure is not None:
        return failure.reason, failure.message
    return FailureReason.INTERNAL_ERROR, f"{type(error).__name__}, see the trainer's log"


def _is_gpu_memory_error(error: BaseException) -> bool:
    """True for torch.OutOfMemoryError, without importing torch: if nobody has imported it, the error is not torch's.

    Preflight runs without torch (`sys.modules["torch"]` is None there).
    """
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    return kind is not None and isinstance(error, kind)


def write_outcome(outcome: Outcome, path: Path) -> ExitCode:
    """Writes the termination message to `path`; returns the exit code of the process."""
    try:
        path.write_text(outcome.encode(), encoding="utf-8")
    except OSError as error:
        log.error("the outcome cannot be written to %s: %s", path, error.strerror)
    return outcome.exit_code


def _newest_checkpoint(progress: ProgressTracker) -> str:
    step = progress.value("checkpoint_step") or progress.value("resumed_from_step")
    return "no checkpoint is stored" if step is None else f"the newest checkpoint is that of step {step}"


def _rounded(loss: float | None) -> float | None:
    """The loss to 4 decimals, as the status shows it."""
    return None if loss is None else round(loss, 4)


def _position(progress: ProgressTracker) -> dict[str, int | None]:
    """Steps of the run, where it ended."""
    names = ("step", "total_steps", "checkpoint_step", "resumed_from_step")
    return {name: progress.value(name) for name in names}
