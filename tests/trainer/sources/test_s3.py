"""s3:// sources, against a real server."""

import itertools
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FailureReason
from finetune_test_servers.faulty_store import Fault, FaultyStore
from finetune_test_servers.s3_server import S3Server
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources import SourceAccess, fetch_dataset, fetch_model, s3
from finetune_trainer.storage.object_store import ignore_bytes

_numbers = itertools.count(1)
MODEL = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickle", "model.py": b"code"}


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    name = f"sources-{next(_numbers)}"
    s3_server.create_bucket(name)
    return name


@pytest.fixture
def access(s3_server: S3Server, tmp_path: Path) -> SourceAccess:
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_text(s3_server.access_key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(s3_server.secret_key)
    return SourceAccess(credentials=folder, endpoint_url=s3_server.endpoint_url)


def _put(store: S3Server, bucket: str, objects: dict[str, bytes]) -> None:
    for key, body in objects.items():
        store.client().put_object(Bucket=bucket, Key=key, Body=body)


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_model_is_a_prefix(
    s3_server: S3Server, bucket: str, access: SourceAccess, tmp_path: Path, slash: str
) -> None:
    _put(s3_server, bucket, {f"base/{name}": body for name, body in MODEL.items()} | {"base2/config.json": b"{}"})
    moved: list[int] = []
    found = fetch_model(f"s3://{bucket}/base{slash}", None, tmp_path / "base", access, moved.append)
    assert {path.name for path in (tmp_path / "base").iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in found.files] == ["config.json", "model.safetensors"]
    assert sum(moved) == len(b"{}weights")
    assert found.revision is None


def test_a_dataset_is_an_object_or_a_prefix(
    s3_server: S3Server, bucket: str, access: SourceAccess, tmp_path: Path
) -> None:
    _put(s3_server, bucket, {"data/a.jsonl": b"1\n", "data/sub/b.jsonl": b"2\n", "top.jsonl": b"3\n"})
    one = fetch_dataset(f"s3://{bucket}/data/a.jsonl", "train", tmp_path / "one", access, ignore_bytes)
    top = fetch_dataset(f"s3://{bucket}/top.jsonl", "train", tmp_path / "top", access, ignore_bytes)
    every = fetch_dataset(f"s3://{bucket}/data/", "train", tmp_path / "all", access, ignore_bytes)
    assert [path.read_bytes() for path in (*one.files, *top.files)] == [b"1\n", b"3\n"]
    assert [path.relative_to(tmp_path).as_posix() for path in every.files] == ["all/a.jsonl", "all/sub/b.jsonl"]
    assert len({one.digest, top.digest, every.digest}) == 3


def test_a_changed_byte_changes_the_digest(
    s3_server: S3Server, bucket: str, access: SourceAccess, tmp_path: Path
) -> None:
    digests = []
    for body in (b"1\n", b"2\n", b"1\n"):
        _put(s3_server, bucket, {"a.jsonl": body})
        found = fetch_dataset(f"s3://{bucket}/a.jsonl", "train", tmp_path / "data", access, ignore_bytes)
        digests.append(found.digest)
    assert digests[0] == digests[2] != digests[1]


def test_keys_that_lead_out_of_the_folder_are_left_alone(
    s3_server: S3Server, bucket: str, access: SourceAccess, tmp_path: Path
) -> None:
    absolute = tmp_path / "absolute.jsonl"
    hostile = {"data/../../climbed.jsonl": b"x", f"data/{absolute}": b"x", "data/a.jsonl": b"1\n"}
    _put(s3_server, bucket, hostile)
    found = fetch_dataset(f"s3://{bucket}/data/", "train", tmp_path / "deep" / "data", access, ignore_bytes)
    assert [path.name for path in found.files] == ["a.jsonl"]
    assert not absolute.exists()
    assert not list(tmp_path.rglob("climbed.jsonl"))


MISSING = {
    "a model that is not there": ("model", "base/", FailureReason.MODEL_NOT_FOUND),
    "a dataset that is not there": ("dataset", "data.jsonl", FailureReason.DATASET_NOT_FOUND),
    "an empty prefix": ("dataset", "data/", FailureReason.DATASET_NOT_FOUND),
}


@pytest.mark.parametrize(("kind", "path", "reason"), MISSING.values(), ids=MISSING)
@pytest.mark.parametrize("has_bucket", [True, False])
def test_what_is_missing_is_named(
    bucket: str, access: SourceAccess, tmp_path: Path, kind: str, path: str, reason: FailureReason, has_bucket: bool
) -> None:
    where = bucket if has_bucket else "no-such-bucket"
    fetch = partial(fetch_model, revision=None) if kind == "model" else partial(fetch_dataset, split="train")
    with pytest.raises(TrainerError, match=f"s3://{where}") as refusal:
        fetch(f"s3://{where}/{path}", work=tmp_path / "work", access=access, on_bytes=ignore_bytes)
    assert refusal.value.reason is reason


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_a_refusal_is_no_access_and_quotes_no_key(
    s3_server: S3Server, bucket: str, access: SourceAccess, tmp_path: Path, code: str
) -> None:
    with FaultyStore.start(s3_server) as faulty:
        faulty.faults = [Fault("GET", "list-type=2", code=code, times=100)]
        proxied = SourceAccess(credentials=access.credentials, endpoint_url=faulty.endpoint_url)
        with pytest.raises(TrainerError) as refusal:
            fetch_model(f"s3://{bucket}/base/", None, tmp_path / "base", proxied, ignore_bytes)
    assert refusal.value.reason is FailureReason.MODEL_ACCESS_DENIED
    assert s3_server.access_key not in refusal.value.message


def test_a_disk_that_is_too_small_is_full_before_the_download(
    s3_server: S3Server, bucket: str, access: SourceAccess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(s3_server, bucket, {f"base/{name}": body for name, body in MODEL.items()})
    usage = type("Usage", (), {"free": 5})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(TrainerError, match="are needed to download") as refusal:
        fetch_model(f"s3://{bucket}/base/", None, tmp_path / "base", access, ignore_bytes)
    assert refusal.value.reason is FailureReason.DISK_FULL
    assert list((tmp_path / "base").iterdir()) == []


def test_an_object_that_is_replaced_while_it_arrives_is_seen(
    s3_server: S3Server, bucket: str, access: SourceAccess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "SMALL_BYTES", 0)
    _put(s3_server, bucket, {f"base/{name}": body for name, body in MODEL.items()})
    with FaultyStore.start(s3_server) as faulty:
        shorter = partial(_put, s3_server, bucket, {"base/model.safetensors": b"cut"})
        faulty.faults = [Fault("HEAD", "model.safetensors", forwards=True, then=shorter)]
        proxied = SourceAccess(credentials=access.credentials, endpoint_url=faulty.endpoint_url)
        with pytest.raises(TrainerError, match="arrived with 3 bytes, but its source lists 7") as refusal:
            fetch_model(f"s3://{bucket}/base/", None, tmp_path / "base", proxied, ignore_bytes)
    assert refusal.value.reason is FailureReason.STORAGE_UNAVAILABLE


def test_small_objects_arrive_side_by_side(
    s3_server: S3Server, bucket: str, access: SourceAccess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {f"data/{number:03}.jsonl": b"1\n" * number for number in range(48)}
    _put(s3_server, bucket, rows)
    running, most, lock = 0, 0, threading.Lock()
    read = s3.S3Repository.read

    def slow(*arguments: Any) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return read(*arguments)

    monkeypatch.setattr(s3.S3Repository, "read", slow)
    found = fetch_dataset(f"s3://{bucket}/data/", "train", tmp_path / "data", access, ignore_bytes)
    assert {f"data/{path.name}": path.read_bytes() for path in found.files} == rows
    assert most >= 8, "one after the other, most is 1"


COLLIDING = {
    "a file that is a folder as well": ({"data/a.jsonl": b"1", "data/a.jsonl/b.jsonl": b"2"}, "a.jsonl/b.jsonl cannot"),
    "a name that no disk holds": ({f"data/{'x' * 300}.jsonl": b"1"}, "306 bytes, but files have at most 255"),
}


@pytest.mark.parametrize(("objects", "said"), COLLIDING.values(), ids=COLLIDING)
def test_keys_that_no_disk_can_hold_are_named(
    s3_server: S3Server, bucket: str, access: SourceAccess, tmp_path: Path, objects: dict[str, bytes], said: str
) -> None:
    _put(s3_server, bucket, objects)
    with pytest.raises(TrainerError, match=said) as refusal:
        fetch_dataset(f"s3://{bucket}/data/", "train", tmp_path / "data", access, ignore_bytes)
    assert refusal.value.reason is FailureReason.INVALID_CONFIGURATION
