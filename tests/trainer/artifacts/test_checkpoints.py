"""Checkpoints that count are whole, belong to this very run, and are few: in S3 and in a folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from finetune_api.failures import FailureReason
from finetune_trainer.artifacts.checkpoints import CheckpointStore, DamagedCheckpointError, checkpoint_key
from finetune_trainer.artifacts.store import ArtifactStore
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.object_store import ObjectStore, PreconditionFailedError
from finetune_trainer.training.best_adapter import BestAdapter

KEY = checkpoint_key("spec", "model", "data")
Attempt = Callable[..., ArtifactStore]


@pytest.fixture(params=["S3", "folder"])
def attempt(request: pytest.FixtureRequest, tmp_path: Path, open_attempt: Attempt) -> Attempt:
    """Opens the store of an attempt, of both kinds in turn."""
    folder = tmp_path / "results" if request.param == "folder" else None
    return lambda *arguments, **changes: open_attempt(*arguments, folder=folder, **changes)


@pytest.fixture
def store(attempt: Attempt) -> ArtifactStore:
    return attempt()


@pytest.fixture
def save(store: ArtifactStore, tmp_path: Path) -> Callable[..., CheckpointStore]:
    """Saves checkpoints of these steps."""

    def save_steps(*steps: int, key: str = KEY) -> CheckpointStore:
        checkpoints = CheckpointStore(store, key)
        for step in steps:
            folder = tmp_path / f"checkpoint-{step}"
            (folder / "sub").mkdir(parents=True, exist_ok=True)
            (folder / "adapter.safetensors").write_bytes(b"%08d" % step * 100)
            (folder / "sub" / "state.json").write_text(str(step))
            checkpoints.save(folder, step)
        return checkpoints

    return save_steps


def intact(_: Path) -> None:
    """Find no damage in any content."""


def _objects(store: ObjectStore, step: int) -> list[str]:
    return store.keys(f"checkpoints/{KEY}/step-{step:08d}/")


def _replace(store: ObjectStore, key: str, data: bytes) -> None:
    found = store.read(key)
    store.put_if(key, data, found.tag if found else None)


def test_without_a_checkpoint_there_is_nothing_to_restore(store: ArtifactStore, tmp_path: Path) -> None:
    checkpoints = CheckpointStore(store, KEY)
    assert checkpoints.latest() is None
    assert checkpoints.restore_newest(tmp_path / "restored", intact) is None
    assert not (tmp_path / "restored").exists()


def test_a_checkpoint_comes_back_as_it_was_on_another_node(
    save: Callable[..., CheckpointStore], attempt: Attempt, tmp_path: Path
) -> None:
    save(10)
    other = CheckpointStore(attempt("attempt-2"), KEY)
    assert other.restore_newest(tmp_path / "restored", intact) == 10
    files = {path.relative_to(tmp_path / "restored").as_posix() for path in (tmp_path / "restored").rglob("*.*")}
    assert files == {"adapter.safetensors", "sub/state.json"}
    assert (tmp_path / "restored" / "adapter.safetensors").read_bytes() == b"00000010" * 100


def test_only_the_newest_stay(save: Callable[..., CheckpointStore], store: ArtifactStore) -> None:
    checkpoints = save(10, 20, 30, 40)
    assert checkpoints.latest() == 40
    steps = {key.split("/")[2] for key in store.object_store.keys(f"checkpoints/{KEY}/")}
    assert steps == {"step-00000030", "step-00000040"}


def test_the_best_adapter_outlives_the_checkpoint_of_its_step(
    store: ArtifactStore, attempt: Attempt, tmp_path: Path
) -> None:
    model = nn.Linear(2, 2)
    checkpoints, best = CheckpointStore(store, KEY), BestAdapter(tmp_path / "here", None)
    for step, loss in ((10, 1.5), (20, 1.6), (30, 1.7), (40, 1.8)):
        nn.init.constant_(model.weight, step)
        best.evaluated(model, step, loss)
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        best.save_into(folder)
        checkpoints.save(folder, step)
    other, elsewhere = CheckpointStore(attempt("attempt-2"), KEY), BestAdapter(tmp_path / "there", None)
    assert other.restore_newest(tmp_path / "restored", intact) == 40
    assert not _objects(store.object_store, 10)
    elsewhere.restore_from(tmp_path / "restored")
    elsewhere.load(model)
    assert elsewhere.record == best.record
    assert model.weight[0, 0] == 10


@pytest.mark.parametrize("lost", ["adapter.safetensors", "checkpoint.json"])
def test_with_a_file_missing_the_older_one_is_used(
    save: Callable[..., CheckpointStore], store: ArtifactStore, tmp_path: Path, lost: str
) -> None:
    checkpoints = save(10, 20)
    store.object_store.delete([key for key in _objects(store.object_store, 20) if key.endswith(lost)])
    assert checkpoints.latest() == 10
    assert checkpoints.restore_newest(tmp_path / "restored", intact) == 10


def test_damage_of_the_same_size_is_found_and_the_older_one_used(
    save: Callable[..., CheckpointStore], store: ArtifactStore, tmp_path: Path
) -> None:
    checkpoints = save(10, 20)
    weights = next(key for key in _objects(store.object_store, 20) if key.endswith(".safetensors"))
    _replace(store.object_store, weights, b"00000666" * 100)
    assert checkpoints.latest() == 20
    with pytest.raises(DamagedCheckpointError, match="not what was saved"):
        checkpoints.restore(20, tmp_path / "damaged")
    assert checkpoints.restore_newest(tmp_path / "restored", intact) == 10
    assert (tmp_path / "restored" / "adapter.safetensors").read_bytes() == b"00000010" * 100


def test_content_that_is_of_no_use_is_passed_over(
    save: Callable[..., CheckpointStore], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = save(10, 20)
    seen = []

    def find_damage(folder: Path) -> str | None:
        seen.append((folder / "sub" / "state.json").read_text())
        return "NaN in adapter.safetensors" if seen[-1] == "20" else None

    assert checkpoints.restore_newest(tmp_path / "restored", find_damage) == 10
    assert seen == ["20", "10"]
    assert "checkpoint of step 20 is not used: NaN in adapter.safetensors" in caplog.text


def test_remains_of_an_unfinished_checkpoint_are_removed_later(
    save: Callable[..., CheckpointStore], store: ArtifactStore
) -> None:
    save(10)
    store.object_store.put_if(f"checkpoints/{KEY}/step-00000020/dead/adapter.safetensors", b"half", None)
    checkpoints = save(30)
    assert checkpoints.latest() == 30
    assert _objects(store.object_store, 20)
    save(40)
    assert not _objects(store.object_store, 20)


def test_a_step_that_is_repeated_replaces_the_checkpoint(
    save: Callable[..., CheckpointStore], store: ArtifactStore, attempt: Attempt, tmp_path: Path
) -> None:
    save(10)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "adapter.safetensors").write_bytes(b"again")
    again = CheckpointStore(attempt("attempt-2"), KEY)
    again.save(tmp_path / "again", 10)
    assert CheckpointStore(store, KEY).restore_newest(tmp_path / "restored", intact) == 10
    assert (tmp_path / "restored" / "adapter.safetensors").read_bytes() == b"again"


@pytest.mark.parametrize("changed", [("other", "model", "data"), ("spec", "other", "data"), ("spec", "model", "other")])
def test_checkpoints_of_another_run_are_not_seen(
    save: Callable[..., CheckpointStore], store: ArtifactStore, changed: tuple[str, str, str]
) -> None:
    save(10)
    assert CheckpointStore(store, checkpoint_key(*changed)).latest() is None


def test_an_index_cannot_write_outside_the_target(
    save: Callable[..., CheckpointStore], store: ArtifactStore, tmp_path: Path
) -> None:
    checkpoints = save(10)
    index = next(key for key in _objects(store.object_store, 10) if key.endswith("checkpoint.json"))
    found = store.object_store.read(index)
    assert found is not None
    _replace(store.object_store, index, found.data.replace(b"/adapter.safetensors", b"/../escaped.safetensors"))
    with pytest.raises(DamagedCheckpointError, match="outside itself"):
        checkpoints.restore(10, tmp_path / "restored")
    assert not (tmp_path / "escaped.safetensors").exists()


def test_a_damaged_newest_checkpoint_does_not_cost_the_new_ones(
    store: ArtifactStore, save: Callable[..., CheckpointStore], attempt: Attempt, tmp_path: Path
) -> None:
    """With one checkpoint to keep, the damaged one of step 40 would be the one that stays."""
    store.config = store.config.model_copy(update={"checkpoints_to_keep": 1})
    save(40)
    weights = next(key for key in _objects(store.object_store, 40) if key.endswith(".safetensors"))
    _replace(store.object_store, weights, b"00000666" * 100)

    checkpoints = CheckpointStore(store, KEY)
    assert checkpoints.restore_newest(tmp_path / "restored", intact) is None
    for step in (10, 20, 50):
        checkpoints.save(tmp_path / "checkpoint-40", step)
        assert _objects(store.object_store, step)
        newest = CheckpointStore(attempt("attempt-2"), KEY)
        assert newest.restore_newest(tmp_path / "restored", lambda _: None) == step
    assert not _objects(store.object_store, 10)
    assert not _objects(store.object_store, 40)


def test_a_checkpoint_that_is_not_committed_leaves_no_files(
    save: Callable[..., CheckpointStore], store: ArtifactStore, attempt: Attempt, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    save(10)
    kept = _objects(store.object_store, 10)
    other = attempt("attempt-2")
    checkpoints, put_if = CheckpointStore(other, KEY), type(other.object_store).put_if

    def lose(*_: object) -> None:
        raise PreconditionFailedError

    monkeypatch.setattr(type(other.object_store), "put_if", lose)
    checkpoints.save(tmp_path / "checkpoint-10", 10)
    assert _objects(store.object_store, 10) == kept, "the winner's files stay, the loser's go"

    def fail(self: ObjectStore, key: str, *_: object) -> None:
        raise TrainerError(FailureReason.UPLOAD_CORRUPTED, "damaged")

    monkeypatch.setattr(type(other.object_store), "put_if", put_if)
    (tmp_path / "checkpoint-10" / "last").mkdir()
    put_file = type(other.object_store).put_file
    sent: list[str] = []

    def fail_second(self: ObjectStore, key: str, *rest: object) -> object:
        sent.append(key)
        return put_file(self, key, *rest) if len(sent) < 2 else fail(self, key)  # type: ignore[arg-type]

    monkeypatch.setattr(type(other.object_store), "put_file", fail_second)
    with pytest.raises(TrainerError):
        checkpoints.save(tmp_path / "checkpoint-10", 20)
    assert len(sent) == 2
    assert not _objects(store.object_store, 20)


def test_the_checkpoints_of_a_finished_job_go_and_those_of_others_stay(
    store: ArtifactStore, save: Callable[..., CheckpointStore]
) -> None:
    save(1, key="f" * 12)
    save(1, 2).remove_all()
    assert _objects(store.object_store, 1) == _objects(store.object_store, 2) == []
    assert store.object_store.keys("checkpoints/" + "f" * 12 + "/")
