"""Checkpoints in storage: a job that is stopped or moved goes on where it was, on any node.

Layout: checkpoints/<key>/step-00000020/<attempt id>/<files>, then checkpoints/<key>/step-00000020/checkpoint.json,
written last. A checkpoint without that file, or with a file missing, does not exist. The key says what a checkpoint
is good for: specification, model revision and data; a changed one starts anew.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from finetune_api.base import ApiModel
from finetune_trainer.artifacts.manifest import ManifestFile
from finetune_trainer.artifacts.store import ArtifactStore
from finetune_trainer.storage.digests import files_below, sha256_file
from finetune_trainer.storage.object_store import PreconditionFailedError, ignore_bytes

log = logging.getLogger(__name__)
INDEX_NAME = "checkpoint.json"
STEP_FOLDER = re.compile(r"step-([0-9]{8,})")


class DamagedCheckpointError(Exception):
    """A checkpoint in storage is not what was saved; an older one may be."""


class CheckpointIndex(ApiModel):
    """The commit point of one checkpoint."""

    step: Annotated[int, Field(ge=1)]
    files: Annotated[tuple[ManifestFile, ...], Field(min_length=1)]
    """Paths are relative to the checkpoint's folder."""


def checkpoint_key(spec_digest: str, model_digest: str, dataset_digest: str) -> str:
    """Twelve hex digits: checkpoints of equal keys may be resumed."""
    return hashlib.sha256(f"{spec_digest}\n{model_digest}\n{dataset_digest}\n".encode()).hexdigest()[:12]


class CheckpointStore:
    """Checkpoints of one key; the newest `checkpointsToKeep` stay."""

    def __init__(self, store: ArtifactStore, key: str) -> None:
        self._store = store.object_store
        self._attempt_id = store.attempt_id
        self._keep = store.config.checkpoints_to_keep
        self._folder = f"checkpoints/{key}/"

    def save(self, folder: Path, step: int) -> None:
        """Upload a checkpoint's folder, commit it, and remove older ones. Raises TrainerError; the checkpoint does not
        exist then."""
        base = self._base(step)
        files = []
        for path in files_below(folder):
            name = f"{self._attempt_id}/{path.relative_to(folder).as_posix()}"
            digest = self._store.put_file(base + name, path, ignore_bytes)
            files.append(ManifestFile(path=name, bytes=digest.bytes, sha256=digest.sha256))
        index = CheckpointIndex(step=step, files=tuple(files)).model_dump_json(by_alias=True).encode()
        before = self._store.read(base + INDEX_NAME)
        try:
            self._store.put_if(base + INDEX_NAME, index, before.tag if before else None)
        except PreconditionFailedError:
            log.warning("checkpoint %d was written by another attempt at the same time", step)
            return
        self._prune()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return next(self._complete_steps(), None)

    def restore(self, step: int, target: Path) -> None:
        """Download a checkpoint into an empty folder and verify every file. Raises DamagedCheckpointError, and
        TrainerError for storage that does not answer."""
        index = self._read_index(step)
        if index is None:
            raise DamagedCheckpointError(f"{self._store.uri(self._base(step))} has no index")
        for file in index.files:
            path = target / file.path.partition("/")[2]
            if not path.resolve().is_relative_to(target.resolve()):
                raise DamagedCheckpointError(f"{self._store.uri(self._base(step))} names a path outside itself")
            self._store.get_file(self._base(step) + file.path, path, ignore_bytes)
            if sha256_file(path) != file.sha256:
                raise DamagedCheckpointError(f"{self._store.uri(self._base(step) + file.path)} is not what was saved")

    def restore_newest(self, target: Path) -> int | None:
        """Download the newest checkpoint that is whole into `target`, whose content is replaced; says its step."""
        for step in self._complete_steps():
            shutil.rmtree(target, ignore_errors=True)
            try:
                self.restore(step, target)
            except DamagedCheckpointError as error:
                log.warning("checkpoint %d is not used: %s", step, error)
            else:
                return step
        shutil.rmtree(target, ignore_errors=True)
        return None

    def _complete_steps(self) -> Iterator[int]:
        for step in self._steps():
            index = self._read_index(step)
            if index and all(self._store.size(self._base(step) + file.path) == file.bytes for file in index.files):
                yield step
            else:
                log.warning("checkpoint %d is incomplete and is not used", step)

    def _read_index(self, step: int) -> CheckpointIndex | None:
        found = self._store.read(self._base(step) + INDEX_NAME)
        try:
            return CheckpointIndex.model_validate_json(found.data) if found else None
        except ValidationError:
            return None

    def _steps(self) -> list[int]:
        """Steps of which anything is stored, newest first."""
        names = (key.removeprefix(self._folder).partition("/")[0] for key in self._store.keys(self._folder))
        return sorted({int(match[1]) for name in names if (match := STEP_FOLDER.fullmatch(name))}, reverse=True)

    def _prune(self) -> None:
        """Remove what is older than the checkpoints that stay, remains of unfinished ones included."""
        steps = self._steps()
        committed = [step for step in steps if self._read_index(step)]
        oldest_kept = committed[: self._keep][-1]
        for step in (step for step in steps if step < oldest_kept):
            keys = self._store.keys(self._base(step))
            # The index goes first: half a checkpoint must never look like a whole one.
            self._store.delete(sorted(keys, key=lambda key: not key.endswith(f"/{INDEX_NAME}")))

    def _base(self, step: int) -> str:
        return f"{self._folder}step-{step:08d}/"
