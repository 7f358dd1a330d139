"""Checkpoints in storage: a job that is stopped or moved goes on where it was, on any node.

Layout: checkpoints/<key>/step-00000020/<attempt id>/<files>, then checkpoints/<key>/step-00000020/checkpoint.json,
written last. A checkpoint without that file, or with a file missing, does not exist. The key says what a checkpoint
is good for: specification, model revision and data; a changed one starts anew.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from finetune_api.base import ApiModel
from finetune_api.failures import FailureReason
from finetune_trainer.artifacts.digests import files_below, sha256_file
from finetune_trainer.artifacts.manifest import ManifestFile
from finetune_trainer.artifacts.object_space import ObjectSpace, PreconditionFailedError, ignore_bytes
from finetune_trainer.errors import TrainerError

log = logging.getLogger(__name__)
INDEX_NAME = "checkpoint.json"


class CheckpointIndex(ApiModel):
    """The commit point of one checkpoint."""

    step: Annotated[int, Field(ge=1)]
    files: Annotated[tuple[ManifestFile, ...], Field(min_length=1)]
    """Paths are relative to the checkpoint's folder."""


def checkpoint_key(spec_digest: str, model_digest: str, dataset_digest: str) -> str:
    """Twelve hex digits: checkpoints of equal keys may be resumed."""
    return hashlib.sha256(f"{spec_digest}\n{model_digest}\n{dataset_digest}\n".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class CheckpointStore:
    """Checkpoints of one key; the newest `keep` stay."""

    space: ObjectSpace
    key: str
    attempt_id: str
    keep: int

    def save(self, folder: Path, step: int) -> None:
        """Upload a checkpoint's folder, commit it, and remove older ones."""
        base = self._base(step)
        files = []
        for path in files_below(folder):
            name = f"{self.attempt_id}/{path.relative_to(folder).as_posix()}"
            digest = self.space.put_file(base + name, path, ignore_bytes)
            files.append(ManifestFile(path=name, bytes=digest.bytes, sha256=digest.sha256))
        index = CheckpointIndex(step=step, files=tuple(files))
        before = self.space.read(base + INDEX_NAME)
        try:
            self.space.put_if(
                base + INDEX_NAME, index.model_dump_json(by_alias=True).encode(), before.tag if before else None
            )
        except PreconditionFailedError:
            log.warning("checkpoint %d was written by another attempt at the same time", step)
            return
        self._prune()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        for step in sorted(self._steps(), reverse=True):
            index = self._read_index(step)
            if index and all(self.space.size(self._base(step) + file.path) == file.bytes for file in index.files):
                return step
            log.warning("checkpoint %d is incomplete and is not used", step)
        return None

    def restore(self, step: int, target: Path) -> None:
        """Download a checkpoint and verify every file; raises TrainerError (StorageUnavailable) where one is
        damaged."""
        index = self._read_index(step)
        if index is None:
            raise TrainerError(FailureReason.STORAGE_UNAVAILABLE, f"{self.space.uri(self._base(step))} is gone")
        for file in index.files:
            path = target / file.path.partition("/")[2]
            self.space.get_file(self._base(step) + file.path, path, ignore_bytes)
            if sha256_file(path) != file.sha256:
                message = f"{self.space.uri(self._base(step) + file.path)} is not what was saved"
                raise TrainerError(FailureReason.STORAGE_UNAVAILABLE, message)

    def _read_index(self, step: int) -> CheckpointIndex | None:
        found = self.space.read(self._base(step) + INDEX_NAME)
        try:
            return CheckpointIndex.model_validate_json(found.data) if found else None
        except ValidationError:
            return None

    def _steps(self) -> set[int]:
        base = f"checkpoints/{self.key}/step-"
        keys = self.space.keys(f"checkpoints/{self.key}/")
        return {int(key.removeprefix(base).partition("/")[0]) for key in keys}

    def _prune(self) -> None:
        committed = [step for step in sorted(self._steps(), reverse=True) if self._read_index(step)]
        for step in committed[self.keep :]:
            keys = self.space.keys(self._base(step))
            # The index goes first: half a checkpoint must never look like a whole one.
            self.space.delete(sorted(keys, key=lambda key: not key.endswith(f"/{INDEX_NAME}")))

    def _base(self, step: int) -> str:
        return f"checkpoints/{self.key}/step-{step:08d}/"
