"""Results are published whole, once, or not at all: in S3 and in a folder."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FailureReason
from finetune_api.progress import Resolved
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.existing import Inputs
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.artifacts.store import ArtifactStore, LocalArtifact, Provenance
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.object_store import ignore_bytes

PROVENANCE = Provenance(Resolved(dataset_digest="d" * 64), {"loss": 1.5}, model_version="commit-1")
Attempt = Callable[..., ArtifactStore]


@pytest.fixture(params=["S3", "folder"])
def attempt(request: pytest.FixtureRequest, tmp_path: Path, open_attempt: Attempt) -> Attempt:
    """Opens the store of an attempt, of both kinds in turn."""
    folder = tmp_path / "results" if request.param == "folder" else None
    return lambda *arguments, **changes: open_attempt(*arguments, folder=folder, **changes)


@pytest.fixture
def artifacts(tmp_path: Path) -> list[LocalArtifact]:
    adapter = tmp_path / "adapter"
    (adapter / "sub").mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (adapter / "sub" / "empty.json").write_bytes(b"")
    gguf = tmp_path / "job-Q8_0.gguf"
    gguf.write_bytes(b"GGUF" * 1000)
    return [
        LocalArtifact(ArtifactType.ADAPTER, adapter, "safetensors", "F32"),
        LocalArtifact(ArtifactType.GGUF, gguf, "gguf", "Q8_0"),
    ]


def unchanged() -> Inputs:
    """The model and the data of every result here."""
    return Inputs("commit-1", "d" * 64)


def _publish(store: ArtifactStore, artifacts: list[LocalArtifact]) -> Manifest:
    return store.publish(artifacts, PROVENANCE, ignore_bytes)


def test_what_is_published_can_be_checked_with_sha256sum(attempt: Attempt, artifacts: list[LocalArtifact]) -> None:
    store = attempt()
    store.probe()
    assert store.find_existing(unchanged) is None
    manifest = _publish(store, artifacts)
    adapter, gguf = manifest.artifacts
    assert gguf.sha256 == hashlib.sha256(b"GGUF" * 1000).hexdigest()
    lines = [
        f"{hashlib.sha256(b'weights' * 1000).hexdigest()}  adapter_model.safetensors\n",
        f"{hashlib.sha256(b'').hexdigest()}  sub/empty.json\n",
    ]
    assert adapter.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert adapter.uri.endswith("/attempts/uid-1.attempt-1/adapter/")
    assert gguf.uri.endswith("/attempts/uid-1.attempt-1/gguf/job-Q8_0.gguf")
    assert store.object_store.keys("attempts/") == sorted(file.path for file in manifest.files())
    assert attempt("attempt-2").find_existing(unchanged) == manifest


def test_bytes_are_counted_as_they_move(attempt: Attempt, artifacts: list[LocalArtifact]) -> None:
    moved: list[int] = []
    manifest = attempt().publish(artifacts, PROVENANCE, moved.append)
    assert sum(moved) == sum(artifact.bytes for artifact in manifest.artifacts)


def test_of_attempts_that_commit_at_once_exactly_one_counts(
    attempt: Attempt, artifacts: list[LocalArtifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [attempt(f"attempt-{number}") for number in range(4)]
    barrier = threading.Barrier(len(stores))
    kind = type(stores[0].object_store)
    commit = kind.put_if

    def commit_together(*arguments: Any) -> None:
        barrier.wait(20)  # all have uploaded before the first commits: the race is in the request that decides
        commit(*arguments)

    monkeypatch.setattr(kind, "put_if", commit_together)
    with ThreadPoolExecutor(len(stores)) as pool:
        results = list(pool.map(lambda store: _publish(store, artifacts), stores))
    assert len({result.attempt_id for result in results}) == 1
    assert set(stores[0].object_store.keys("attempts/")) == {file.path for file in results[0].files()}


def test_of_two_jobs_at_once_the_second_says_so(attempt: Attempt, artifacts: list[LocalArtifact]) -> None:
    first, second = attempt("attempt-1", uid="uid-1"), attempt("attempt-2", uid="uid-2")
    assert first.find_existing(unchanged) is second.find_existing(unchanged) is None
    _publish(first, artifacts)
    with pytest.raises(TrainerError) as refusal:
        _publish(second, artifacts)
    assert refusal.value.reason is FailureReason.OUTPUT_EXISTS
    found = first.find_existing(unchanged)
    assert found is not None
    assert found.attempt_id == "uid-1.attempt-1"


EXISTING = {
    "Reuse, same specification": ({"onExisting": "Reuse"}, "reused"),
    "Reuse, another specification": ({"onExisting": "Reuse", "steps": 6}, "another specification"),
    "Fail": ({"onExisting": "Fail"}, "an earlier job"),
    "Overwrite": ({"onExisting": "Overwrite"}, "trains"),
    "Fail, but it is this very job's own result": ({"onExisting": "Fail", "uid": "uid-1"}, "reused"),
}


@pytest.mark.parametrize(("changes", "expected"), EXISTING.values(), ids=EXISTING)
def test_a_result_that_is_there(
    attempt: Attempt, artifacts: list[LocalArtifact], changes: dict[str, str], expected: str
) -> None:
    manifest = _publish(attempt("attempt-1"), artifacts)
    later = attempt("attempt-2", **{"uid": "uid-2", **changes})
    if expected == "reused":
        assert later.find_existing(unchanged) == manifest
    elif expected == "trains":
        assert later.find_existing(unchanged) is None
        replaced = _publish(later, artifacts)
        assert replaced.attempt_id == "uid-2.attempt-2"
        assert {key.split("/")[1] for key in later.object_store.keys("attempts/")} == {"uid-2.attempt-2"}
    else:
        with pytest.raises(TrainerError, match=expected) as refusal:
            later.find_existing(unchanged)
        assert refusal.value.reason is FailureReason.OUTPUT_EXISTS


def test_overwrite_replaces_only_what_it_has_seen(attempt: Attempt, artifacts: list[LocalArtifact]) -> None:
    _publish(attempt("attempt-1"), artifacts)
    late, quick = (attempt(f"attempt-{uid}", uid=uid, onExisting="Overwrite") for uid in ("uid-2", "uid-3"))
    assert late.find_existing(unchanged) is quick.find_existing(unchanged) is None
    _publish(quick, artifacts)
    with pytest.raises(TrainerError) as refusal:
        _publish(late, artifacts)
    assert refusal.value.reason is FailureReason.OUTPUT_EXISTS


def test_a_result_with_a_lost_file_is_not_reused(attempt: Attempt, artifacts: list[LocalArtifact]) -> None:
    store = attempt()
    manifest = _publish(store, artifacts)
    store.object_store.delete([manifest.files()[0].path])
    with pytest.raises(TrainerError, match="is missing"):
        attempt("attempt-2").find_existing(unchanged)


def test_a_foreign_manifest_is_never_replaced(attempt: Attempt, artifacts: list[LocalArtifact]) -> None:
    store = attempt(onExisting="Overwrite")
    store.object_store.put_if("manifest.json", b'{"hello": 1}', None)
    with pytest.raises(TrainerError, match="not a manifest of this project"):
        store.find_existing(unchanged)


def test_what_does_not_fit_into_a_manifest_shows_before_the_upload(
    attempt: Attempt, artifacts: list[LocalArtifact]
) -> None:
    store = attempt()
    with pytest.raises(ValueError, match="finite"):
        store.publish(artifacts, Provenance(PROVENANCE.resolved, {"loss": float("nan")}), ignore_bytes)
    assert store.object_store.keys("attempts/") == []
