"""The commit of a result in a folder: whatever fails or ends the run in it, no manifest names a file that is gone."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.progress import Resolved
from finetune_api.vocabulary import ArtifactType
from finetune_test_models.tiny_runs import Builder
from finetune_trainer import stopping
from finetune_trainer.artifacts.download import read_manifest
from finetune_trainer.artifacts.manifest import MANIFEST_NAME
from finetune_trainer.artifacts.store import ArtifactStore, LocalArtifact, Provenance, open_store
from finetune_trainer.cli.run import STOPPED_BY_PERSON, _stop
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal

STEPS = {"writing": (os, "fsync"), "naming": (Path, "hardlink_to"), "clearing up": (Path, "unlink")}
SEEN = 0.5
"""Seconds for which a person's second Ctrl-C is left alone with the files, where nothing holds it back."""


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def nobody_asks_to_stop() -> Iterator[None]:
    yield
    stopping.reset()


@pytest.fixture
def store(run_config: Builder, settings: Settings) -> ArtifactStore:
    return open_store(run_config(), settings.attempt_id, None, settings.output_folder)


@pytest.fixture
def publish(store: ArtifactStore, settings: Settings) -> Callable[[], Any]:
    adapter = settings.work / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    artifacts = [LocalArtifact(ArtifactType.ADAPTER, adapter, "safetensors", "F32")]
    provenance = Provenance(Resolved(model_revision="r", dataset_digest="0" * 64))
    return lambda: store.publish(artifacts, provenance, lambda count: None)


def in_commit(step: str, action: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Calls `action` before this step of the commit."""
    place, name = STEPS[step]
    original = getattr(place, name)

    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        is_manifest = step == "writing" or MANIFEST_NAME in str(path)
        if is_manifest:
            action()
        return original(path, *arguments, **options)

    patch.setattr(place, name, call)


def is_whole(store: ArtifactStore) -> bool:
    """True for a result with all its files; False if there is no manifest."""
    if store.object_store.read(MANIFEST_NAME) is None:
        return False
    manifest = read_manifest(store.object_store)
    assert all(store.object_store.size(file.path) == file.bytes for file in manifest.files())
    return True


@pytest.mark.parametrize("step", STEPS)
def test_a_second_ctrl_c_in_a_commit_deletes_no_file_of_the_result(
    step: str,
    store: ArtifactStore,
    publish: Callable[[], Any],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes: list[int] = []
    stop_signal, progress = StopSignal(), ProgressTracker()
    stop_signal.guard(lambda now: _stop(store.config, settings, progress, now=now))
    monkeypatch.setattr(os, "_exit", codes.append)

    def press_twice() -> None:
        for _ in range(2):
            stop_signal._receive(signal.SIGINT)

    watch = threading.Thread(target=press_twice)

    def press_in_commit() -> None:
        if watch.ident is None:
            watch.start()
            watch.join(SEEN)

    with monkeypatch.context() as patch:
        in_commit(step, press_in_commit, patch)
        publish()
    watch.join()
    assert codes == [STOPPED_BY_PERSON]
    assert is_whole(store)
    assert "the result was finished before that: it is complete in" in capsys.readouterr().err


@pytest.mark.parametrize("step", STEPS)
def test_a_commit_that_fails_leaves_a_whole_result_or_none(
    step: str, store: ArtifactStore, publish: Callable[[], Any], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise Ended

    with monkeypatch.context() as patch:
        in_commit(step, fail, patch)
        with pytest.raises(Ended):
            publish()
    assert is_whole(store) == (step == "clearing up")
    assert settings.output_folder is not None
    partial = list(settings.output_folder.rglob(f".{MANIFEST_NAME}.*"))
    assert len(partial) == (step == "clearing up"), "only where removing it is what failed"


def test_a_second_ctrl_c_before_the_commit_leaves_nothing(
    store: ArtifactStore, publish: Callable[[], Any], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: files that are no result are deleted."""
    stop_signal = StopSignal()
    stop_signal.guard(lambda now: _stop(store.config, settings, ProgressTracker(), now=now))

    def files() -> int:
        assert settings.output_folder is not None
        return sum(path.is_file() for path in settings.output_folder.rglob("*"))

    uploaded: list[int] = []

    def end(code: int) -> None:
        uploaded.append(files())
        raise Ended(code)

    def press_twice() -> None:
        uploaded.append(files())
        for _ in range(2):
            stop_signal._receive(signal.SIGINT)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr("finetune_trainer.artifacts.store.stop_point", press_twice)
    with pytest.raises(Ended):
        publish()
    assert uploaded == [1, 0]
    assert not is_whole(store)
