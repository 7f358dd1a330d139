"""Whose a result is: a job takes or replaces its own only, and clears away nothing that another one wrote."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest

from finetune_api.progress import Resolved
from finetune_api.vocabulary import ArtifactType
from finetune_test_servers.faulty_store import FaultyStore, Request
from finetune_test_servers.s3_server import S3Server
from finetune_trainer.artifacts.checkpoints import CheckpointStore, checkpoint_key
from finetune_trainer.artifacts.existing import Inputs
from finetune_trainer.artifacts.store import ArtifactStore, LocalArtifact, Provenance
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.object_store import ignore_bytes

Open = Callable[..., ArtifactStore]
SAME = Inputs("commit-1", "d" * 64, "e" * 64)
PROVENANCE = Provenance(Resolved(dataset_digest="d" * 64, evaluation_digest="e" * 64), model_version="commit-1")
SHARED = "models/bot"
"""A place that an administrator's template, such as {name}, gives to two jobs."""


@pytest.fixture
def weights(tmp_path: Path) -> list[LocalArtifact]:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights" * 1000)
    return [LocalArtifact(ArtifactType.GGUF, path, "gguf", "Q8_0")]


CHANGED = {
    "the model": (Inputs("commit-2", "d" * 64, "e" * 64), "but the model has changed since it was made 20"),
    "the data": (Inputs("commit-1", "f" * 64, "e" * 64), "but the data have changed"),
    "the evaluation's data": (Inputs("commit-1", "d" * 64, None), "but the evaluation data have changed"),
    "model and data": (Inputs("commit-2", "f" * 64, "e" * 64), "but the model and the data have changed"),
}


@pytest.mark.parametrize(("inputs", "message"), CHANGED.values(), ids=CHANGED)
def test_a_result_of_other_inputs_is_not_reused(
    open_attempt: Open, weights: list[LocalArtifact], inputs: Inputs, message: str
) -> None:
    manifest = open_attempt().publish(weights, PROVENANCE, ignore_bytes)
    again = open_attempt("attempt-2", uid="uid-2")
    with pytest.raises(TrainerError, match=message) as refusal:
        again.find_existing(lambda: inputs)
    assert refusal.value.reason == "OutputExists"
    assert again.find_existing(lambda: SAME) == manifest
    assert open_attempt("attempt-3").find_existing(lambda: inputs) == manifest, "the job's own, from before a restart"


@pytest.mark.parametrize(
    ("owner", "policy"), [("team-a/bot", "Reuse"), ("team-a/bot", "Overwrite"), ("team-b/x", "Fail")]
)
def test_the_result_of_another_job_is_refused_by_its_name(
    open_attempt: Open, weights: list[LocalArtifact], owner: str, policy: str
) -> None:
    manifest = open_attempt(job=owner, place=SHARED).publish(weights, PROVENANCE, ignore_bytes)
    late = open_attempt("attempt-2", uid="uid-2", job="team-b/bot", place=SHARED, onExisting=policy)
    with pytest.raises(TrainerError, match=f"the result of another job, {owner}, made 20") as refusal:
        late.find_existing(lambda: SAME)
    assert refusal.value.reason == "OutputExists"

    # One that did not look, or looked too early, finds out when it commits.
    with pytest.raises(TrainerError, match=f"another job, {owner}, while"):
        late.publish(weights, PROVENANCE, ignore_bytes)
    assert late.object_store.keys("attempts/") == [file.path for file in manifest.files()]


def test_jobs_in_one_place_leave_each_others_files_alone(
    open_attempt: Open, weights: list[LocalArtifact], s3_server: S3Server, bucket: str
) -> None:
    """As in two clusters that share a bucket: same namespace and name, another UID."""
    other, ours = open_attempt("x", uid="uid-other"), open_attempt("dead")
    for store in (other, ours):
        store.object_store.put_file(f"attempts/{store.attempt_id}/gguf/half.gguf", weights[0].path, ignore_bytes)
    running = open_attempt("alive")
    running.probe()
    manifest = running.publish(weights, PROVENANCE, ignore_bytes)
    theirs = "attempts/uid-other.x/gguf/half.gguf"
    assert running.object_store.keys("attempts/") == sorted([*(file.path for file in manifest.files()), theirs])

    # Overwrite replaces the result and its files, and no more.
    again = open_attempt("again", uid="uid-2", onExisting="Overwrite")
    assert again.find_existing(lambda: SAME) is None
    again.publish(weights, PROVENANCE, ignore_bytes)
    assert again.object_store.keys("attempts/") == ["attempts/uid-2.again/gguf/model.gguf", theirs]


def test_a_place_inside_another_keeps_its_files(open_attempt: Open, weights: list[LocalArtifact]) -> None:
    outer = open_attempt("old", place=SHARED)
    inner = open_attempt("inner", uid="uid-2", job="team-b/attempts", place=f"{SHARED}/attempts")
    kept = inner.publish(weights, PROVENANCE, ignore_bytes)
    outer.publish(weights, PROVENANCE, ignore_bytes)
    replacing = open_attempt("new", uid="uid-3", place=SHARED, onExisting="Overwrite")
    replacing.probe()
    assert replacing.find_existing(lambda: SAME) is None
    replacing.publish(weights, PROVENANCE, ignore_bytes)
    assert inner.find_existing(lambda: SAME) == kept
    assert [key.split("/")[1] for key in replacing.object_store.keys("attempts/")] == [
        "attempts",
        "manifest.json",
        "uid-3.new",
    ]


def test_a_manifest_that_names_foreign_files_deletes_none(open_attempt: Open, weights: list[LocalArtifact]) -> None:
    store = open_attempt()
    manifest = store.publish(weights, PROVENANCE, ignore_bytes)
    (artifact,) = manifest.artifacts
    paths = ("preflight/report.html", "attempts/../preflight/report.html", "attempts//x")
    files = tuple(artifact.files[0].model_copy(update={"path": path}) for path in paths)
    forged = manifest.model_copy(update={"artifacts": (artifact.model_copy(update={"files": files}),)})
    for path in paths:
        store.object_store.put_file(path, weights[0].path, ignore_bytes)
    found = store.object_store.read("manifest.json")
    assert found is not None
    store.object_store.put_if("manifest.json", forged.encode(), found.tag)

    again = open_attempt("again", uid="uid-2", onExisting="Overwrite")
    assert again.find_existing(lambda: SAME) is None
    again.publish(weights, PROVENANCE, ignore_bytes)
    assert [store.object_store.size(path) for path in paths] == [7000] * 3


@pytest.mark.parametrize("prefix", ["", "models/", "it's/(new)!*"])
def test_every_write_begins_with_the_jobs_place(
    open_attempt: Open, faulty: FaultyStore, weights: list[LocalArtifact], tmp_path: Path, prefix: str
) -> None:
    store = open_attempt(prefix=prefix)
    store.probe()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    checkpoints = CheckpointStore(store, checkpoint_key("a"))
    for step in (1, 2, 3):
        checkpoints.save(folder, step)
    store.publish(weights, PROVENANCE, ignore_bytes)
    checkpoints.remove_all()

    place = f"{prefix.strip('/')}/team/job/".lstrip("/")
    written = [request for request in faulty.requests if request.method in ("PUT", "DELETE", "POST")]
    keys = [key for request in written for key in keys_of(request)]
    assert len(keys) > 10
    assert not [key for key in keys if not key.startswith(place)]
    assert any(request.deletes for request in written)


def keys_of(request: Request) -> list[str]:
    """Keys that a request writes or deletes."""
    key = unquote(request.path.partition("?")[0].removeprefix("/").partition("/")[2])
    return [key] if key else list(request.deletes)
