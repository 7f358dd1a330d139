"""What goes wrong between a trainer and its bucket, over real sockets: a named reason, and nothing half published."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_api.failures import FailureReason
from finetune_api.progress import Resolved
from finetune_api.vocabulary import ArtifactType
from finetune_test_servers.faulty_store import Fault, FaultyStore
from finetune_test_servers.s3_server import S3Server
from finetune_trainer.artifacts.store import ArtifactStore, LocalArtifact, Provenance
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage import s3_upload
from finetune_trainer.storage.object_store import ignore_bytes
from finetune_trainer.storage.s3_store import S3Store

PROVENANCE = Provenance(Resolved(dataset_digest="d" * 64))
PART = 5 << 20
Open = Callable[..., ArtifactStore]


@pytest.fixture
def small(tmp_path: Path) -> list[LocalArtifact]:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"0123456789" * 1000)
    return [LocalArtifact(ArtifactType.GGUF, path, "gguf", "Q8_0")]


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LocalArtifact]:
    """Three parts, of the least size that S3 takes."""
    monkeypatch.setattr(s3_upload.PartPlan, "part_bytes", lambda plan, size: PART)
    path = tmp_path / "large.gguf"
    path.write_bytes(os.urandom(2 * PART + 17))
    return [LocalArtifact(ArtifactType.GGUF, path, "gguf", "Q8_0")]


def _manifests(store: ArtifactStore) -> list[str]:
    return [key for key in store.object_store.keys("") if key.endswith("manifest.json")]


def test_the_manifest_is_the_last_write_and_conditional(
    open_attempt: Open, faulty: FaultyStore, small: list[LocalArtifact]
) -> None:
    open_attempt().publish(small, PROVENANCE, ignore_bytes)
    writes = [request for request in faulty.requests if request.method in ("PUT", "POST", "DELETE")]
    assert writes[-1].path.split("?")[0].endswith("/out/team/job/manifest.json")
    assert writes[-1].headers["If-None-Match"] == "*"
    assert len(writes) == 2


@pytest.mark.parametrize("which", ["small", "large"])
def test_a_damaged_upload_is_found_and_not_published(
    open_attempt: Open, faulty: FaultyStore, which: str, request: pytest.FixtureRequest
) -> None:
    artifacts = request.getfixturevalue(which)
    part = ".gguf" if which == "small" else "partNumber=2"
    faulty.faults = [Fault("PUT", part, damages=True)]
    store = open_attempt()
    with pytest.raises(TrainerError, match="returns other content than was sent") as failure:
        store.publish(artifacts, PROVENANCE, ignore_bytes)
    assert failure.value.reason is FailureReason.UPLOAD_CORRUPTED
    assert _manifests(store) == []
    # The control: the same upload, undamaged, is published.
    store.publish(artifacts, PROVENANCE, ignore_bytes)
    assert _manifests(store) == ["manifest.json"]


def test_a_part_that_fails_is_repeated_alone(
    open_attempt: Open, faulty: FaultyStore, large: list[LocalArtifact]
) -> None:
    faulty.faults = [
        Fault("PUT", "partNumber=2", code="InternalError", status=500, times=2),
        Fault("PUT", "partNumber=3", breaks_before=True),
    ]
    open_attempt().publish(large, PROVENANCE, ignore_bytes)
    paths = faulty.paths("PUT")
    assert [sum(f"partNumber={number}" in path for path in paths) for number in (1, 2, 3)] == [1, 3, 2]


def test_an_answer_that_is_lost_does_not_lose_the_commit(
    open_attempt: Open, faulty: FaultyStore, small: list[LocalArtifact]
) -> None:
    faulty.faults = [Fault("PUT", "manifest.json", breaks_after=True)]
    store = open_attempt()
    manifest = store.publish(small, PROVENANCE, ignore_bytes)
    assert sum("manifest.json" in path for path in faulty.paths("PUT")) == 2
    assert store.find_existing(lambda: None) == manifest


def test_credentials_that_expire_are_waited_for(
    open_attempt: Open, faulty: FaultyStore, large: list[LocalArtifact], credentials: Path
) -> None:
    def rotate() -> None:
        threading.Timer(0.3, lambda: (credentials / "AWS_ACCESS_KEY_ID").write_text("AKIAROTATED")).start()

    faulty.faults = [Fault("PUT", "partNumber=2", code="ExpiredToken", status=400, then=rotate)]
    store = open_attempt()
    store.publish(large, PROVENANCE, ignore_bytes)
    commit = next(request for request in faulty.requests if "manifest.json" in request.path and request.method == "PUT")
    assert "AKIAROTATED" in commit.headers["Authorization"]
    assert sum("uploads" in path for path in faulty.paths("POST")) == 1


REFUSALS = {
    "no such bucket": (Fault("PUT", "/", code="NoSuchBucket", status=404), FailureReason.BUCKET_NOT_FOUND),
    "no write access": (Fault("PUT", "/", code="AccessDenied"), FailureReason.STORAGE_NOT_WRITABLE),
    "unknown key": (Fault("PUT", "/", code="InvalidAccessKeyId"), FailureReason.STORAGE_NOT_WRITABLE),
    "wrong secret": (Fault("PUT", "/", code="SignatureDoesNotMatch"), FailureReason.STORAGE_NOT_WRITABLE),
    "encryption key denied": (Fault("PUT", "/", code="KMS.AccessDenied"), FailureReason.STORAGE_NOT_WRITABLE),
    "another region": (Fault("PUT", "/", code="PermanentRedirect", status=301), FailureReason.STORAGE_NOT_WRITABLE),
}


@pytest.mark.parametrize(("fault", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_an_output_that_cannot_be_written_shows_at_the_start(
    open_attempt: Open,
    faulty: FaultyStore,
    s3_server: S3Server,
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
    reason: FailureReason,
) -> None:
    fault.times = 100
    faulty.faults = [fault]
    began = time.monotonic()
    with caplog.at_level(logging.INFO), pytest.raises(TrainerError) as refusal:
        open_attempt().probe()
    assert refusal.value.reason is reason
    assert time.monotonic() - began < 5
    texts = refusal.value.message + str(refusal.value) + caplog.text
    assert "s3://artifacts-" in refusal.value.message
    assert s3_server.access_key not in texts
    assert s3_server.secret_key not in texts
    assert "Signature=" not in texts


def test_a_bucket_that_is_really_missing(open_attempt: Open) -> None:
    with pytest.raises(TrainerError, match="s3://not-here") as refusal:
        open_attempt(bucket="not-here").probe()
    assert refusal.value.reason is FailureReason.BUCKET_NOT_FOUND


def test_a_secret_without_keys(open_attempt: Open, credentials: Path) -> None:
    (credentials / "AWS_SECRET_ACCESS_KEY").write_text("")
    with pytest.raises(TrainerError, match="no usable credentials") as refusal:
        open_attempt()
    assert refusal.value.reason is FailureReason.STORAGE_NOT_WRITABLE


def test_the_probe_leaves_nothing(open_attempt: Open) -> None:
    store = open_attempt()
    store.probe()
    assert store.object_store.keys("") == []


def test_unfinished_uploads_of_the_job_are_discarded_at_the_start(
    open_attempt: Open, s3_server: S3Server, bucket: str
) -> None:
    s3 = s3_server.client()
    own = ["attempts/uid-1.old/gguf/model.gguf", "checkpoints/abc/step-00000002/uid-1.old/optimizer.pt"]
    others = [
        "attempts/uid-10.x/gguf/model.gguf",  # of a job in another cluster, in the same place
        "models/team/job/attempts/uid-2.x/gguf/model.gguf",  # of a place below
    ]
    for key in (*own, *others):
        s3.create_multipart_upload(Bucket=bucket, Key=f"out/team/job/{key}")
    s3.create_multipart_upload(Bucket=bucket, Key="out/team/job-2/attempts/uid-1.x/model.gguf")
    open_attempt().probe()
    left = [upload["Key"] for upload in s3.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]
    assert sorted(left) == sorted(
        [f"out/team/job/{key}" for key in others] + ["out/team/job-2/attempts/uid-1.x/model.gguf"]
    )


def test_an_upload_that_fails_discards_its_parts(
    open_attempt: Open, faulty: FaultyStore, s3_server: S3Server, bucket: str, large: list[LocalArtifact]
) -> None:
    faulty.faults = [Fault("PUT", "partNumber=2", code="AccessDenied")]
    store = open_attempt()
    with pytest.raises(TrainerError):
        store.publish(large, PROVENANCE, ignore_bytes)
    assert s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


CRASHING = """
import sys
from pathlib import Path
from finetune_api.progress import Resolved
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.store import LocalArtifact, Provenance, open_store
config, credentials, path = sys.argv[1:]
store = open_store(RunConfig.from_yaml(Path(config).read_text()), "attempt-dead", Path(credentials), None)
artifacts = [LocalArtifact(ArtifactType.GGUF, Path(path), "gguf")]
store.publish(artifacts, Provenance(Resolved(dataset_digest="d" * 64)), lambda count: None)
"""


def test_a_process_killed_between_upload_and_commit_publishes_nothing(
    open_attempt: Open, faulty: FaultyStore, small: list[LocalArtifact], tmp_path: Path, credentials: Path
) -> None:
    later = open_attempt("attempt-2")
    config = tmp_path / "run_config.yaml"
    config.write_text(later.config.to_yaml())
    process = subprocess.Popen([sys.executable, "-c", CRASHING, str(config), str(credentials), str(small[0].path)])
    faulty.faults = [Fault("PUT", "manifest.json", breaks_before=True, then=process.kill)]
    assert process.wait(60) == -9
    assert _manifests(later) == []
    assert {key.split("/")[1] for key in later.object_store.keys("attempts/")} == {"uid-1.attempt-dead"}
    later.probe()
    assert later.find_existing(lambda: None) is None
    later.publish(small, PROVENANCE, ignore_bytes)
    assert {key.split("/")[1] for key in later.object_store.keys("attempts/")} == {"uid-1.attempt-2"}


def test_closing_ends_the_wait_for_a_store_that_is_away(
    open_attempt: Open, faulty: FaultyStore, small: list[LocalArtifact]
) -> None:
    faulty.faults = [Fault("PUT", "/", code="InternalError", status=500, times=1000)]
    store = open_attempt()
    assert isinstance(store.object_store, S3Store)
    threading.Timer(1.0, store.close).start()
    began = time.monotonic()
    with pytest.raises(TrainerError) as failure:
        store.publish(small, PROVENANCE, ignore_bytes)
    assert failure.value.reason is FailureReason.STORAGE_UNAVAILABLE
    assert time.monotonic() - began < 20


def test_a_file_that_changes_while_it_is_uploaded_is_not_published(
    open_attempt: Open, large: list[LocalArtifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing and sending read the file separately: what was sent has to be what was hashed."""
    former = large[0].path.with_suffix(".former")
    former.write_bytes(large[0].path.read_bytes()[:-1] + b"!")
    real = s3_upload.digest_file
    with monkeypatch.context() as patch:
        patch.setattr(s3_upload, "digest_file", lambda path, size, stopped: real(former, size, stopped))
        store = open_attempt()
        with pytest.raises(TrainerError, match="changed while it was uploaded") as refusal:
            store.publish(large, PROVENANCE, ignore_bytes)
    assert refusal.value.reason == "UploadCorrupted"
    assert not _manifests(store)
    assert store.object_store.abort_unfinished(lambda key: True) == 0, "the parts that were sent are discarded"
    assert store.publish(large, PROVENANCE, ignore_bytes).artifacts, "the unchanged file is published"
