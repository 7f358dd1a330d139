"""Checkpoints in storage: a job that was stopped or moved continues on any node.

Layout: checkpoints/<key>/step-00000020/<attempt id>/<files>, then checkpoints/<key>/step-00000020/checkpoint.json,
which is written last. A checkpoint without this index, or without one of its files, is ignored. The key is a digest of
the job's namespace and name, of what determines the trained adapter (`RunConfig.training_digest`), of model and data:
if one of them changes, training starts from the beginning. A change of the export or of the output changes nothing of
it, and a job that was created again goes on where its predecessor stopped.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from finetune_api.base import ApiModel
from finetune_trainer.artifacts.manifest import ManifestFile
from finetune_trainer.artifacts.store import ArtifactStore
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.digests import files_below, sha256_file
from finetune_trainer.storage.object_store import PreconditionFailedError, ignore_bytes

log = logging.getLogger(__name__)
INDEX_NAME = "checkpoint.json"
STEP_FOLDER = re.compile(r"step-([0-9]{8,})")


class DamagedCheckpointError(Exception):
    """A checkpoint in storage differs from what was saved. An older one may be intact."""


class CheckpointIndex(ApiModel):
    """Content of checkpoint.json, the commit point of one checkpoint."""

    step: Annotated[int, Field(ge=1)]
    files: Annotated[tuple[ManifestFile, ...], Field(min_length=1)]
    """Paths are relative to the checkpoint's folder."""


def checkpoint_key(*determining: str) -> str:
    """Returns twelve hex digits of what determines a training; a run resumes from checkpoints with its own key only."""
    return hashlib.sha256("".join(f"{text}\n" for text in determining).encode()).hexdigest()[:12]


class CheckpointStore:
    """Checkpoints with one key, of which the newest `checkpointsToKeep` are kept."""

    def __init__(self, store: ArtifactStore, key: str) -> None:
        self._store = store.object_store
        self._attempt_id = store.attempt_id
        self._keep = store.config.checkpoints_to_keep
        self._discard = store.discard_uploads
        self._folder = f"checkpoints/{key}/"
        self._damaged: set[int] = set()
        """Steps whose checkpoints were found to be useless."""

    def save(self, folder: Path, step: int) -> None:
        """Uploads a checkpoint's folder, commits it and deletes older ones.

        Raises TrainerError; the checkpoint is then not committed.
        """
        base = self._base(step)
        try:
            files = self._upload(folder, base)
        except BaseException as error:
            if not self._is_own(step):
                self._discard(f"{base}{self._attempt_id}/", error)
            raise

        index = CheckpointIndex(step=step, files=files).model_dump_json(by_alias=True).encode()
        # A step may exist already: an attempt that resumes from an older checkpoint reaches it again.
        before = self._store.read(base + INDEX_NAME)
        try:
            self._store.put_if(base + INDEX_NAME, index, before.tag if before else None)
        except PreconditionFailedError:
            log.warning("checkpoint of step %d was committed by another attempt at the same time", step)
            if not self._is_own(step):
                self._discard(f"{base}{self._attempt_id}/")
            return

        self._damaged.discard(step)
        self._prune(step)

    def remove_all(self) -> None:
        """Deletes every checkpoint, once the result is committed: nothing goes on from them.

        An error is only logged, and a signal only ends it.
        """
        try:
            self._store.delete(self._store.keys(self._folder))
        except TrainerError as error:
            log.warning("the checkpoints were not deleted: %s", error.message)

    def remove_from(self, step: int) -> None:
        """Deletes the checkpoints of this step and of later ones: the run diverged from there. Raises TrainerError."""
        for found in (each for each in self._steps() if each >= step):
            log.warning("the checkpoint of step %d is deleted: the loss has exploded from there", found)
            self._delete(found)

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return next(self._complete_steps(), None)

    def restore(self, step: int, target: Path) -> None:
        """Downloads a checkpoint into an empty folder and verifies every file.

        Raises DamagedCheckpointError, and TrainerError if the storage does not answer.
        """
        index = self._read_index(step)
        if index is None:
            raise DamagedCheckpointError(f"{self._store.uri(self._base(step))} has no index")

        for file in index.files:
            path = target / file.path.partition("/")[2]  # without the attempt's id
            # The index is data from a store: its paths must not lead out of the target.
            if not path.resolve().is_relative_to(target.resolve()):
                raise DamagedCheckpointError(f"{self._store.uri(self._base(step))} names a path outside itself")

            self._store.get_file(self._base(step) + file.path, path, ignore_bytes)
            if sha256_file(path) != file.sha256:
                raise DamagedCheckpointError(f"{self._store.uri(self._base(step) + file.path)} is not what was saved")

    def restore_newest(self, target: Path, find_damage: Callable[[Path], str | None]) -> int | None:
        """Downloads the newest intact checkpoint and returns its step, or None. The content of `target` is replaced.

        `find_damage` looks into the downloaded folder: it returns what makes the content useless, or None.
        """
        for step in self._complete_steps():
            shutil.rmtree(target, ignore_errors=True)
            try:
                self.restore(step, target)
                if (damage := find_damage(target)) is not None:
                    raise DamagedCheckpointError(damage)
            except DamagedCheckpointError as error:
                log.warning("checkpoint of step %d is not used: %s", step, error)
                self._damaged.add(step)
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
                log.warning("checkpoint of step %d is incomplete and is not used", step)
                self._damaged.add(step)

    def _read_index(self, step: int) -> CheckpointIndex | None:
        found = self._store.read(self._base(step) + INDEX_NAME)
        try:
            return CheckpointIndex.model_validate_json(found.data) if found else None
        except ValidationError:
            return None

    def _steps(self) -> list[int]:
        """Returns the steps of which any file is stored, newest first."""
        names = (key.removeprefix(self._folder).partition("/")[0] for key in self._store.keys(self._folder))
        return sorted({int(match[1]) for name in names if (match := STEP_FOLDER.fullmatch(name))}, reverse=True)

    def _upload(self, folder: Path, base: str) -> tuple[ManifestFile, ...]:
        files = []
        for path in files_below(folder):
            name = f"{self._attempt_id}/{path.relative_to(folder).as_posix()}"
            digest = self._store.put_file(base + name, path, ignore_bytes)
            files.append(ManifestFile(path=name, bytes=digest.bytes, sha256=digest.sha256))
        return tuple(files)

    def _is_own(self, step: int) -> bool:
        """True if this attempt has committed a checkpoint of the step before."""
        index = self._read_index(step)
        return index is not None and any(file.path.startswith(f"{self._attempt_id}/") for file in index.files)

    def _prune(self, saved: int) -> None:
        """Deletes everything older than the checkpoints that are kept, remains of unfinished ones included.

        Only those up to step `saved` count. Newer ones are of another course of training, which was found damaged or
        goes on in another pod: counted, they would cost the checkpoint that was just saved.
        """
        steps = [step for step in self._steps() if step <= saved]
        usable = [step for step in steps if step not in self._damaged and self._read_index(step)]
        oldest_kept = usable[: self._keep][-1]

        for step in (step for step in steps if step < oldest_kept):
            self._delete(step)

    def _delete(self, step: int) -> None:
        # The index is deleted first: half a checkpoint must never look like a whole one.
        keys = self._store.keys(self._base(step))
        self._store.delete(sorted(keys, key=lambda key: not key.endswith(f"/{INDEX_NAME}")))

    def _base(self, step: int) -> str:
        return f"{self._folder}step-{step:08d}/"
