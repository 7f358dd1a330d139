"""Every ending has an outcome that says what happened and nothing that must not be said."""

import errno
from pathlib import Path

import pytest
import torch

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import MAX_BYTES, Outcome, Result
from finetune_trainer.errors import InterruptedRunError, TrainerError
from finetune_trainer.job.outcome import failed, write_outcome
from finetune_trainer.job.progress_tracker import ProgressTracker

SECRET = "hunter2"
ENDINGS = {
    "an error of ours": (TrainerError(FailureReason.INVALID_ROW, "line 3"), "InvalidRow", ExitCode.DATA, "line 3"),
    "a stop": (InterruptedRunError("stopped"), "Interrupted", ExitCode.INTERRUPTED, "stopped"),
    "GPU memory": (torch.OutOfMemoryError("x"), "CudaOutOfMemory", ExitCode.OUT_OF_MEMORY, "GPU's memory"),
    "a namesake of torch's error": (
        type("OutOfMemoryError", (Exception,), {})(),
        "InternalError",
        ExitCode.INTERNAL,
        "log",
    ),
    "host memory": (MemoryError(), "OutOfMemory", ExitCode.OUT_OF_MEMORY, "host's memory"),
    "a full disk": (OSError(errno.ENOSPC, "x"), "DiskFull", ExitCode.DISK_FULL, "disk is full"),
    "a defect": (KeyError(SECRET), "InternalError", ExitCode.INTERNAL, "KeyError"),
}


@pytest.mark.parametrize(("error", "reason", "code", "part"), ENDINGS.values(), ids=ENDINGS)
def test_an_error_becomes_its_reason(error: BaseException, reason: str, code: ExitCode, part: str) -> None:
    outcome = failed(error, ProgressTracker())
    assert (outcome.reason, outcome.exit_code) == (reason, code)
    assert part in outcome.message
    assert SECRET not in outcome.encode()
    assert (outcome.result is Result.INTERRUPTED) == (reason == "Interrupted")


def test_a_long_message_is_cut_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "termination-log"
    outcome = failed(TrainerError(FailureReason.INVALID_ROW, "ä" * 5000), ProgressTracker())
    assert write_outcome(outcome, path) == ExitCode.DATA
    assert len(path.read_bytes()) <= MAX_BYTES
    read = Outcome.decode(path.read_text())
    assert read.reason == FailureReason.INVALID_ROW
    assert read.message.endswith("…")


def test_an_outcome_that_cannot_be_written_still_has_its_exit_code(tmp_path: Path) -> None:
    assert write_outcome(failed(MemoryError(), ProgressTracker()), tmp_path / "no" / "such") == ExitCode.OUT_OF_MEMORY
