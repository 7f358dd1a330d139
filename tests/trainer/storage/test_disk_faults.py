"""A full or read-only disk has its own reason, however a library wraps the error, and is not retried.

A real disk that is full is a tmpfs of a MiB in a mount namespace of its own, where this machine lets us make one.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.outcome import explain
from finetune_trainer.storage.disk_faults import explain_disk_fault, free_disk
from finetune_trainer.storage.retry import Cause, RetryPolicy, retry


def wrapped(cause: BaseException) -> Exception:
    """An error of a library that keeps the cause only in the chain."""
    error = RuntimeError("the transfer failed")
    error.__context__ = cause
    return error


FULL = {
    "the system's own error": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "a quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "wrapped": wrapped(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "safetensors' text": RuntimeError('Io(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
}
FORBIDDEN = {
    "read-only": OSError(errno.EROFS, os.strerror(errno.EROFS), "/out/adapter"),
    "no permission": PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/out/adapter"),
    "not permitted": wrapped(PermissionError(errno.EPERM, os.strerror(errno.EPERM), "/out/adapter")),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_told_with_what_is_free(error: Exception, tmp_path: Path) -> None:
    reason, message = explain(error, tmp_path)
    assert reason is FailureReason.DISK_FULL
    assert "MiB are free in" in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("error", FORBIDDEN.values(), ids=FORBIDDEN)
def test_an_output_that_turns_read_only_has_a_reason(error: Exception) -> None:
    reason, message = explain(error)
    assert reason is FailureReason.STORAGE_NOT_WRITABLE
    assert "/out/adapter" in message


def test_other_errors_are_no_matter_of_the_disk() -> None:
    refused = ConnectionError(errno.EPERM, os.strerror(errno.EPERM))  # by a firewall
    silent = RuntimeError("PytorchStreamWriter failed writing")
    for error in (ValueError("no"), refused, OSError(errno.EIO, "I/O error"), silent):
        assert explain_disk_fault(error) is None
    own = TrainerError(FailureReason.INVALID_ROW, "No space left on device")
    assert explain_disk_fault(own) is None


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_not_retried(error: Exception) -> None:
    calls: list[None] = []

    def action() -> None:
        calls.append(None)
        raise error

    def explain_other(_: Exception) -> tuple[TrainerError, Cause]:
        return TrainerError(FailureReason.HUB_UNAVAILABLE, "no answer"), Cause.OUTAGE

    with pytest.raises(TrainerError) as refusal:
        retry(action, RetryPolicy(), (OSError, RuntimeError), explain_other)
    assert (refusal.value.reason, len(calls)) == (FailureReason.DISK_FULL, 1)


def test_a_pod_may_use_no_more_than_its_limit(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(1000))
    assert free_disk(tmp_path, 5000) == 4000
    assert free_disk(tmp_path, None) > 5000


WRITES = {
    "safetensors": (
        "from safetensors.torch import save_file; save_file({'a': torch.zeros(1 << 20)}, 'full/a.safetensors')"
    ),
    "PyTorch": "torch.save(torch.zeros(1 << 20), 'full/a.pt')",
    "Arrow": (
        "from datasets.arrow_writer import ArrowWriter; writer = ArrowWriter(path='full/a.arrow')\n"
        "    for _ in range(2000): writer.write({'a': list(range(1000))})\n"
        "    writer.finalize()"
    ),
    "a copy": "import shutil; open('big', 'wb').write(bytes(1 << 21)); shutil.copyfile('big', 'full/big')",
}
PROGRAM = """
import sys
import torch
from pathlib import Path
from finetune_trainer.job.outcome import explain
try:
    {write}
except Exception as error:
    print(repr(error), file=sys.stderr)
    print(*explain(error, Path("full").absolute()))
"""


@pytest.mark.parametrize("library", WRITES)
def test_a_disk_that_fills_is_known_by_every_writer(library: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM.format(write=WRITES[library]))
    mount = "mount -t tmpfs -o size=1m none full"
    script = f"{mount} || exit 77; exec {sys.executable} program.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("this machine lets nobody mount a tmpfs in a namespace of its own")
    assert done.stdout.startswith("DiskFull"), done.stdout + done.stderr
    assert " of 1 MiB are free" in done.stdout
