"""Ends of other ranks, as rank 0 tells them; the whole way is in test_whole_runs.py."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_trainer.cli import rank
from finetune_trainer.distributed.other_ranks import BaseFiles, RankTask
from finetune_trainer.distributed.rank_ends import count_memory_kills, explain_end, is_lost_connection
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.outcome import failed
from finetune_trainer.job.progress_tracker import ProgressTracker

Builder = Callable[..., RunConfig]


WHO = "rank 1 of 2"


class EndedError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def task(run_config: Builder, tmp_path: Path) -> RankTask:
    return RankTask(
        config=run_config(), base_model=BaseFiles(folder=tmp_path, digest=""), work=tmp_path, rank=1, size=2, port=1
    )


@pytest.fixture
def end_code(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which the rank would have ended."""
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise EndedError

    monkeypatch.setattr(rank.os, "_exit", end)
    return codes


def test_a_rank_says_its_own_reason(task: RankTask, end_code: list[int]) -> None:
    with pytest.raises(EndedError):
        rank._fail(task, torch.OutOfMemoryError("CUDA out of memory"))
    error = explain_end(WHO, task.failure_file, 1, memory_ran_out=False)
    assert end_code == [1]
    assert error.reason is FailureReason.CUDA_OUT_OF_MEMORY
    assert error.message == "rank 1 of 2: the run does not fit the GPU's memory"


def test_what_all_ranks_find_is_left_to_rank_0(task: RankTask, end_code: list[int]) -> None:
    with pytest.raises(EndedError):
        rank._fail(task, TrainerError(FailureReason.NON_FINITE_LOSS, "the loss is nan at step 3"))
    assert end_code == [0]
    assert not task.failure_file.exists()


def test_a_rank_without_a_word_ends_by_its_code_or_signal(task: RankTask) -> None:
    ended = explain_end(WHO, task.failure_file, 3, memory_ran_out=True)
    assert ended.message.startswith("rank 1 of 2 ended with exit code 3")
    killed = explain_end(WHO, task.failure_file, -signal.SIGKILL, memory_ran_out=False)
    assert killed.reason is FailureReason.INTERNAL_ERROR
    assert "was killed by signal 9" in killed.message


def test_a_rank_that_the_kernel_killed_for_its_memory_is_out_of_memory(task: RankTask, tmp_path: Path) -> None:
    killed = explain_end(WHO, task.failure_file, -signal.SIGKILL, memory_ran_out=True)
    assert killed.reason is FailureReason.OUT_OF_MEMORY
    assert killed.message == "rank 1 of 2 was killed as the pod's memory ran out: raise spec.resources.memory"

    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert count_memory_kills((tmp_path / "none", tmp_path / "memory.events")) == 2
    assert count_memory_kills((tmp_path / "none",)) == 0


def test_rank_0_names_itself_where_its_memory_runs_out() -> None:
    progress = ProgressTracker()
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert failed(error, progress).message == "the run does not fit the GPU's memory"
    progress.resolve(world_size=4)
    assert failed(error, progress).message == "rank 0 of 4: the run does not fit the GPU's memory"
    told = TrainerError(FailureReason.CUDA_OUT_OF_MEMORY, "rank 3 of 4: the run does not fit the GPU's memory")
    assert failed(told, progress).message == told.message


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_a_lost_connection_is_no_reason_of_its_own(error: Exception, expected: bool) -> None:
    assert is_lost_connection(error) is expected
